import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_tools.base import declared
from data_tools.base.durable import read_json
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.packs.materialize import Config, check, materialize
from data_tools.packs.store import Store
from data_tools.records.balance import Balance
from data_tools.tasks.task import Source
from tests.data_tools.conftest import build, line
from tests.inputs import Inputs


def config_of(tokenizer: Path, *inputs: Path, **changes: object) -> Config:
    source = Source(inputs=[str(path) for path in inputs])
    return Config(task="calculator", tokenizer=str(tokenizer), source=source, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def left_out(folder: Path) -> list[dict]:
    path = folder / "left_out.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


any_line = st.one_of(
    st.lists(st.sampled_from(["1+1=2", "2*3=6", "2*3=7", "9/3=3.0", "1200*10=12000", "x=1"]), max_size=3).map(
        lambda marks: line(*marks).encode()
    ),
    st.sampled_from([b"", b"  ", b"{", b"\xff\xfe", b'{"answer": 1}', "{\u2028}".encode()]),
)
a_file = st.tuples(st.lists(any_line, max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
files = st.lists(a_file, max_size=3)  # of (lines, line end, whether the last line has one)


@settings(max_examples=20)  # each writes a dozen durable files an element
@given(files, st.integers(2, 7), st.booleans())
def test_the_store_and_its_balance_do_not_depend_on_the_number_of_elements(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, contents_of: list, count: int, dedupe: bool
) -> None:
    folder = tmp_path_factory.mktemp("m")
    inputs = []
    for place, (lines, end, last_end) in enumerate(contents_of):
        inputs.append(folder / f"{place}.jsonl")
        inputs[-1].write_bytes(end.join(lines) + (end if last_end else b""))
    config = config_of(tokenizer_folder, *inputs, on_bad_row="bucket", dedupe=dedupe, max_tokens=10)
    config.source.synthetic_rows = 5
    one, facts = build(config, folder, 1)
    many, facts_of_many = build(config, folder, count)
    assert contents(many) == contents(one)
    assert facts_of_many == facts
    Balance.from_json(read_json(one / "balance.json")).check()
    assert facts["kept"] == len(Store(one)) and facts["tokens"] == Store(one).tokens
    assert Counter(told["bucket"] for told in left_out(one)) == facts["buckets"]


def test_rows_are_the_canonical_marks_in_order_with_their_lines(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([line("18*.5=9.00", "2+2=4"), "", line("7-10=-3")]))
    config = config_of(tokenizer_folder, tmp_path / "a.jsonl", task_options={"reverse_digits": True})
    store, _ = build(config, tmp_path, 2)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    texts = [tokenizer.decode(Store(store).ids(row)) for row in range(3)]
    assert texts == ["18*0.5=9<eos>", "2+2=4<eos>", "7-10=3-<eos>"]
    assert Store(store).lines.tolist() == [1, 1, 3]
    assert Store(store).mask(0).tolist() == [0] * 7 + [1, 1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_equal_rows_the_first_in_source_order_is_kept(tmp_path: Path, tokenizer_folder: Path, count: int) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([line("1+1=2"), line("2+2=4"), line("1+1=2.0")]))
    (tmp_path / "b.jsonl").write_text("\n".join([line("3+3=6"), line("2+2=4"), line("3+3=6")]))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    out, _ = build(config_of(tokenizer_folder, *inputs), tmp_path, count)
    store = Store(out)
    assert list(zip(store.sources.tolist(), store.lines.tolist())) == [(0, 1), (0, 2), (1, 1)]
    sheets = Balance.from_json(read_json(out / "balance.json")).sources
    assert [dict(sheet.dropped) for sheet in sheets] == [{"duplicate": 1}, {"duplicate": 2}]
    everything, _ = build(config_of(tokenizer_folder, *inputs, dedupe=False), tmp_path / "all", count)
    assert len(Store(everything)) == 6


def test_every_drop_has_its_bucket(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = [line("1+1=2", "1+1=2.0", "1+1=3", "x=3", "11111*10000=111110000", "7//2=3"), "", line(), "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out, facts = build(config_of(tokenizer_folder, tmp_path / "a.jsonl", on_bad_row="bucket", max_tokens=10), tmp_path)
    assert facts["buckets"] == {
        "blank_line": 1, "malformed_line": 1, "no_rows": 1,
        "duplicate": 1, "wrong_answer": 1, "unparsable": 1, "too_long": 1,
    }  # fmt: skip
    assert (facts["lines"], facts["rows"], facts["kept"]) == (4, 6, 2)


@pytest.mark.parametrize("count", [1, 3])
def test_each_row_that_is_left_out_is_listed_with_its_line_and_reason(
    tmp_path: Path, tokenizer_folder: Path, count: int
) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join([line("1+1=2"), "{oops", line("11111*10000=111110000"), line("1+1=2.0")]))
    second.write_text("\n".join([line("2+2=4"), line("1+1=2"), line("2+2=5")]))
    out, facts = build(config_of(tokenizer_folder, first, second, on_bad_row="bucket", max_tokens=10), tmp_path, count)
    listed = left_out(out)
    assert [(told["file"], told["line"], told["bucket"]) for told in listed] == [
        (str(first), 2, "malformed_line"), (str(first), 3, "too_long"), (str(first), 4, "duplicate"),
        (str(second), 2, "duplicate"), (str(second), 3, "wrong_answer"),
    ]  # fmt: skip
    assert "not JSON" in listed[0]["reason"] and listed[1]["reason"] == "22 tokens; max_tokens is 10"
    assert listed[2]["reason"] == "the same text with the same loss mask as a row before it"
    assert facts["left_out"] == {"file": "left_out.jsonl", "rows": 5}


def test_a_character_the_tokenizer_lacks_drops_the_row(tmp_path: Path) -> None:
    from data_tools.chats.char_tokenizer import write_char_tokenizer

    write_char_tokenizer(tmp_path / "tokenizer", "0123456789+=")
    (tmp_path / "a.jsonl").write_text(line("1+1=2", "2*2=4"))
    _, facts = build(config_of(tmp_path / "tokenizer", tmp_path / "a.jsonl"), tmp_path)
    assert (facts["kept"], facts["buckets"]) == (1, {"unknown_character": 1})


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [(b"{oops", "not JSON"), (b'{"answer": 1}', "a int as answer"), (b'{"answer": "\xff"}', "not UTF-8")],
)
def test_a_malformed_line_fails_by_file_and_line_in_whichever_element_holds_it(
    tmp_path: Path, tokenizer_folder: Path, count: int, bad: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    good = line("1+1=2").encode()
    path.write_bytes(b"\n".join([good] * 6 + [b""] + [good] * 5 + [bad] + [good] * 3))
    mistakes = []
    for index in range(count):
        (tmp_path / str(index)).mkdir()
        try:
            materialize(config_of(tokenizer_folder, path), tmp_path / str(index), index, count)
        except UserMistake as mistake:
            mistakes.append(str(mistake))
    assert len(mistakes) == 1
    assert mistakes[0].startswith(f"{path}:13: {reason}") and "on_bad_row" in mistakes[0] and "\n" not in mistakes[0]


def test_nothing_left_is_a_mistake_with_the_buckets(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line("1+1=3", "2+2=5"))
    with pytest.raises(UserMistake, match="no row is left of 2: 2 wrong_answer; .* lists each with line") as caught:
        build(config_of(tokenizer_folder, tmp_path / "a.jsonl"), tmp_path)
    (listed,) = [Path(word) for word in str(caught.value).split() if word.endswith("/left_out.jsonl")]
    assert [json.loads(text)["line"] for text in listed.read_text().splitlines()] == [1, 1]  # of one line


def test_gsm8k_adds_up(tmp_path: Path, tokenizer_folder: Path, inputs: Inputs) -> None:
    config = config_of(tokenizer_folder, inputs.data("gsm8k/train.jsonl"), inputs.data("gsm8k/test.jsonl"))
    out, facts = build(config, tmp_path, 3)
    train, test = Balance.from_json(read_json(out / "balance.json")).sources
    lines, train_rows, test_rows = (7473, 7378, 95), (23_716, 10_625, 13_091), (4_282, 1_331, 2_951)
    if inputs.shipped:  # counted by hand
        lines, train_rows, test_rows = (10, 9, 1), (14, 13, 1), (5, 4, 1)
    assert (train.lines, train.lines_with_rows, train.lines_dropped["no_rows"]) == lines
    for source, rows in ((train, train_rows), (test, test_rows)):
        assert (source.rows, source.kept, source.dropped["duplicate"]) == rows and len(source.dropped) == 1
    assert len(Store(out)) == facts["kept"] == train_rows[1] + test_rows[1]
    words = Store(out).row_hashes
    assert len(np.unique(words, axis=0)) == len(words)


def test_heldout_and_training_stores_share_no_prompt(tmp_path: Path, tokenizer_folder: Path) -> None:
    prompts = []
    for split in ("train", "heldout"):
        source = Source(synthetic_rows=400, synthetic_split=split)
        out, facts = build(Config(task="calculator", tokenizer=str(tokenizer_folder), source=source), tmp_path / split)
        assert facts["rows"] == 400
        prompts.append({tuple(words) for words in Store(out).prompt_hashes.tolist()})
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_all_problems_are_told_at_once_and_nothing_is_imported_for_it(tmp_path: Path) -> None:
    config = Config(
        task="calculatr",
        source=Source(inputs=["/no/file.jsonl"], synthetic_rows=-1, synthetic_split="training"),
        tokenizer="/no/tokenizer",
        max_tokens=-1,
        on_bad_row="bukcet",
    )
    problems = {problem.where: problem.message for problem in declared.check_with(config, check)}
    assert problems.keys() == {
        "task", "on_bad_row", "max_tokens", "source.synthetic_rows", "source.synthetic_split",
    }  # fmt: skip
    assert "did you mean bucket?" in problems["on_bad_row"] and "did you mean calculator?" in problems["task"]
    assert [problem.where for problem in check(Config(tokenizer="gpt2"))] == ["source"]
    wrong_option = Config(task="calculator", tokenizer="a/b", task_options={"x": 1}, source=Source(synthetic_rows=1))
    assert [problem.where for problem in check(wrong_option)] == ["task_options"]
    code = (
        "import sys; from data_tools.packs import materialize, pack; materialize.check(materialize.Config()); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_files_are_looked_for_when_the_work_starts_not_by_check(tmp_path: Path) -> None:
    config = Config(tokenizer="/run/init/KEY/tokenizer", source=Source(inputs=["/run/gen/KEY/rows.jsonl"]))
    assert check(config) == []
    with pytest.raises(UserMistake, match="no file /run/gen/KEY/rows.jsonl(.|\n)*no folder /run/init/KEY/tokenizer"):
        materialize(config, tmp_path, 0, 1)


def test_the_configs_are_omegaconf_structured_configs() -> None:
    from data_tools.packs.pack import Config as PackConfig

    merged = OmegaConf.merge(
        OmegaConf.structured(Config), {"source": {"inputs": ["a"]}, "task_options": {"reverse_digits": True}}
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config) and isinstance(config.source, Source) and config.source.inputs == ["a"]
    assert isinstance(OmegaConf.to_object(OmegaConf.structured(PackConfig)), PackConfig)
