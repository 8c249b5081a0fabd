"""Shares of any number of elements are the file; damage is told with the file's name, and records by line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.mistake import UserMistake
from data_tools.records import inputs, readers, shares
from data_tools.records.blend_file import read_blend
from data_tools.records.shares import open_share
from data_tools.tasks import mix
from jobs.kind import Placement
from jobs.phases import decontaminate, dolci_prepare, materialize, reject_filter

ROWS = [{"question": f"{n}?", "answer": "x" * (n % 7) * 40} for n in range(57)]


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def spell(path, rows, end=b"\n"):
    """The rows in the format that the name says."""
    name = path.name
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
        return path
    text = (
        json.dumps(rows, indent=1).encode()
        if ".jsonl" not in name
        else b"".join(json.dumps(row).encode() + end for row in rows)
    )
    pack = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
    half = text.find(b"\n", len(text) // 2) + 3
    path.write_bytes(pack(text[:half]) + pack(text[half:]) if pack is not bytes else text)  # two members or frames
    return path


def read(path, count, **named):
    shares = [open_share(path, index, count, **named) for index in range(count)]
    records = [list(share) for share in shares]
    return [json.loads(item) if isinstance(item, bytes) else item for part in records for item in part], shares, records


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst", "a.parquet"]
)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_shares_one_after_the_other_are_the_file(tmp_path, name, count):
    path = spell(tmp_path / name, ROWS)
    rows, shares, parts = read(path, count)
    assert rows == ROWS
    for share, part in zip(shares, parts):
        for number, record in enumerate(part, 1):
            record = json.loads(record) if isinstance(record, bytes) else record
            index = ROWS.index(record) + 1
            line = 4 * index - 2 if ".jsonl" not in name else index  # of JSON, indented: [ { two keys } …
            assert share.place(number) in (f"{path}:{line}", f"{path}: row {index}")


@settings(max_examples=30)
@given(
    st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(["gz", "zst"]),
    st.integers(1, 40),
)
def test_packed_lines_are_shared_whatever_the_blocks(tmp_path_factory, lines, count, last_end, kind, block):
    path = tmp_path_factory.mktemp("p") / f"a.jsonl.{kind}"
    data = b"\n".join(lines) + (b"\n" if last_end else b"")
    pack = gzip.compress if kind == "gz" else zstd
    path.write_bytes(b"".join(pack(data[start : start + 20]) for start in range(0, len(data), 20)) or pack(b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "_BLOCK", block)
        parts = [list(open_share(path, index, count)) for index in range(count)]
    assert b"".join(line for part in parts for line in part) == data


def test_the_format_is_told_by_content_where_the_name_does_not_and_may_be_named(tmp_path):
    for name, content, rows in (
        ("a", b'\n[{"a": 1},\n {"a": 2}]', 2),
        ("b", b'{"a": 1}\n{"a": 2}\n', 2),
        ("c", b'{"a":\n 1}', 1),
    ):
        (tmp_path / name).write_bytes(content)
        assert len(read(tmp_path / name, 2)[0]) == rows
    (tmp_path / "d").write_bytes(b"[1]\n[2]\n")
    assert read(tmp_path / "d", 1, format="jsonl")[0] == [[1], [2]]


def test_keys_that_parquet_spells_as_null_are_absent(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "tool_calls": [{"x": 1}]},
            ]
        }
    ]
    assert read(spell(tmp_path / "a.parquet", rows), 1)[0] == rows


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "scribbled"])
def test_a_damaged_file_is_named_by_the_element_that_meets_the_damage(tmp_path, name, damage):
    path = spell(tmp_path / name, ROWS * 40)
    data = path.read_bytes()
    at = len(data) * 3 // 4
    path.write_bytes(data[:at] if damage == "cut" else data[:at] + b"\xff" * 40 + data[at + 40 :])
    told = []
    for index in range(3):
        try:
            list(open_share(path, index, 3))
        except UserMistake as mistake:
            told.append(str(mistake))
    assert told and all(str(path) in line and "\n" not in line for line in told)


def test_an_empty_file_has_no_records(tmp_path):
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
        assert read(tmp_path / name, 3)[0] == []


@pytest.mark.parametrize(("entries", "expected"), [
    (["0.3", "a", "0.7", "b"], [("a", 0.3), ("b", 0.7)]), ([0.3, "a", 1, "b"], [("a", 0.3), ("b", 1.0)]),
    ("0.3 a 0.7 b", [("a", 0.3), ("b", 0.7)]), (["a", "b", "c"], [("a", 1.0), ("b", 1.0), ("c", 1.0)]),
    ("a b", [("a", 1.0), ("b", 1.0)]), (None, []),
])  # fmt: skip
def test_a_blend_is_files_with_weights(entries, expected):
    assert read_blend(Path("blend.json"), {"train": entries, "valid": []}) == {"train": expected, "valid": []}


def test_a_blend_with_a_file_in_a_weights_place_is_refused():
    with pytest.raises(UserMistake, match="blend.json: train: '0,7' stands where a weight belongs"):
        read_blend(Path("blend.json"), {"train": ["0.3", "a", "0,7", "b"]})


def test_a_blend_given_for_records_is_spelled_as_the_settings_it_stands_for(tmp_path):
    (tmp_path / "blend.json").write_text('{"train": [0.3, "a.jsonl", 0.7, "b.jsonl"], "valid": [], "test": []}')
    with pytest.raises(UserMistake) as caught:
        open_share(tmp_path / "blend.json", 0, 1)
    assert 'source.inputs: ["a.jsonl", "b.jsonl"] here, and weights: {"a.jsonl": 0.3, "b.jsonl": 0.7} in pack' in str(
        caught.value
    )


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": 1, "a": 1}', '{"b": [{"c": {"a": null, "a": 1}}]}'])
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
def test_a_key_that_stands_twice_is_told_and_the_last_one_does_not_win(tmp_path, text, ending):
    path = tmp_path / f"r.{ending}"
    data = f"[{text}]" if ending == "json" else f'{{"a": 1}}\n{text}\n'
    path.write_bytes(gzip.compress(data.encode()) if ending.endswith("gz") else data.encode())
    if ending == "json":
        with pytest.raises(UserMistake, match="r.json: the key 'a' stands twice in one object; mend the file"):
            list(readers.records(path))
        return
    first, second = readers.records(path)
    assert first.value == {"a": 1} and second.problem == "the key 'a' stands twice in one object"


def test_an_input_names_the_files_that_a_folder_has_of_a_kind_packed_ones_too(tmp_path):
    """For every phase that reads folders: none is left out for its spelling, and what names nothing is told at once."""
    rows = ["b.csv", "A.CSV", "c.jsonl", "d.jsonl.gz", "e.jsonl.zst", "f.parquet"]
    for name in [*rows, "balance.json", "notes.txt"]:
        if name not in rows or name.lower().endswith("csv"):
            (tmp_path / name).write_text("question,answer\n1,2\n")
        else:
            spell(tmp_path / name, ROWS)
    (tmp_path / "folder.csv").mkdir()

    def found(kinds: tuple[str, ...]) -> list[str]:
        return [file.name for file in inputs.files_of([str(tmp_path), str(tmp_path / "notes.txt")], kinds)[:-1]]

    assert found(inputs.CSV) == ["A.CSV", "b.csv"]
    assert found(inputs.JSONL) == ["c.jsonl", "d.jsonl.gz", "e.jsonl.zst"]
    assert found(mix.READ) == sorted(rows)
    for file in inputs.files_of([str(tmp_path)], mix.READ):
        assert [record.value for record in readers.records(file)], file
    with pytest.raises(UserMistake) as caught:
        inputs.files_of([str(tmp_path / "absent"), str(tmp_path / "folder.csv")], inputs.CSV, "source.inputs")
    assert [problem.where for problem in caught.value.problems] == ["source.inputs"] * 2


def test_a_pattern_names_what_it_matches_and_json_files_count_in_a_folder_that_has_no_others(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.json", "a.json", "below/c.jsonl", "note.txt"):
        (tmp_path / name).write_text('{"a": 1}\n')

    def found(name: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in inputs.records_of(str(tmp_path / name))]

    assert found("") == found("*.json") == ["a.json", "b.json"]
    assert found("**/*.json*") == ["a.json", "b.json", "below/c.jsonl"]
    assert found("note.*") == ["note.txt"]
    assert found("*.csv") == ["*.csv"] and inputs.missing([("inputs", tmp_path / "*.csv")])
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n')
    assert found("") == ["d.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.csv", "a.parquet"])
def test_a_large_file_that_cannot_be_cut_is_refused_before_every_element_reads_all_of_it(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text("a,b\n1,2\n") if name == "a.csv" else spell(path, ROWS)
    size = path.stat().st_size
    monkeypatch.setattr(shares, "MOST_READ_OVER", 10 * size)
    groups = 6 if name == "a.parquet" else 1
    for count, refused in ((1, False), (11 * groups, False), (11 * groups + groups, True)):
        refused &= name != "a.jsonl"
        problems = shares.check_shares([("inputs", path)], count)
        assert bool(problems) is refused, (count, problems)
        if not refused:
            open_share(path, 0, count)
            continue
        with pytest.raises(UserMistake) as caught:
            open_share(path, 0, count)
        assert str(caught.value) == problems[0].message
        assert str(path) in str(caught.value) and f"array: {11 * groups} or less" in str(caught.value)
    assert shares.check_shares([("inputs", tmp_path / "to come.json")], 10**6) == []


@pytest.mark.parametrize("kind", [dolci_prepare, decontaminate, materialize, reject_filter])
def test_each_phase_that_shares_files_refuses_such_a_one_in_its_plan(tmp_path, monkeypatch, kind):
    path = spell(tmp_path / "a.jsonl.gz", ROWS)
    monkeypatch.setattr(shares, "MOST_READ_OVER", 10 * path.stat().st_size)
    config = kind.Config()
    if kind is materialize:
        config.source.inputs, config.tokenizer, config.chat.template = [str(path)], "t", "{{ messages }}"
    else:
        config.inputs = [str(path)]
    told = [problem.message for problem in kind.check(config, Placement(ranks=1, elements=12))]
    assert any("array: 11 or less" in message for message in told), told


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("name, text, said", [
    ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2: not JSON: Expecting value at column 6"),
    ("a.jsonl", b'{}\n{}\n{}\n{"a": 1', "a.jsonl:4: not JSON: Expecting ',' delimiter at column 8"),
    ("a.jsonl", b'{}\n[1, 2\n', "a.jsonl:2: not JSON: Expecting ',' delimiter at column 6"),
    ("a.json", b'[\n {"a": 1},\n {"a": }\n]\n', "a.json: not JSON: Expecting value at line 3, column 8"),
])  # fmt: skip
def test_a_json_error_names_one_line_the_files(tmp_path, name, text, said, end):
    path = tmp_path / name
    path.write_bytes(text.rstrip() + end)
    with pytest.raises(UserMistake) as caught:
        for record in readers.records(path):
            if record.problem:
                raise record.mistake()
    assert str(caught.value).startswith(f"{tmp_path}/{said}"), caught.value
    assert str(caught.value).count("line") == name.endswith(".json")
