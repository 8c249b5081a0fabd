"""Every reader has a bound, told with the variable that raises it; the time of a line is linear in its bytes."""

import gzip
import json
import os
import resource
import time
from pathlib import Path

import pytest
import yaml

from data_tools.base import bounds, durable
from data_tools.base.yaml_loaders import load, read_file, read_values
from data_tools.chats.chat import ChatConfig, ChatRows
from data_tools.chats.encoder import Encoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.records import readers, shares
from data_tools.records.csv_tables import read_table
from data_tools.tasks import process
from tests.data_tools.chats import write_tokenizer
from tests.data_tools.test_readers import spell

MIB = 1 << 20


def long_line(size, name, folder):
    """A file of one record of about so many bytes, behind a short one; of JSON written in pieces, for what is asked is
    the memory of the reader."""
    path = folder / name
    if name.endswith(".csv"):
        path.write_bytes(b"a,b\n1,2\n3," + b"x" * size + b"\n")
    elif name.endswith(".parquet"):
        spell(path, [{"a": "y"}, {"a": "x" * size}])
    else:
        with gzip.open(path, "wb", compresslevel=6) if name.endswith(".gz") else open(path, "wb") as file:
            file.write(b'{"a": "y"}\n{"a": "')
            for start in range(0, size, MIB):
                file.write(b"x" * min(MIB, size - start))
            file.write(b'"}\n')
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.jsonl.gz", "r.csv", "r.parquet"])
def test_a_record_above_the_bound_is_refused_with_what_raises_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv(bounds.LINE.variable, "1")
    path = long_line(MIB + 100, name, tmp_path)
    with pytest.raises(UserMistake, match=f"{path}.*more than 1 MiB in one record.*AFTEROK_LINE_MIB raises it"):
        list(readers.records(path))
    monkeypatch.setenv(bounds.LINE.variable, "2")
    assert len(list(readers.records(path))) == 2


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_json_in_one_piece_above_the_bound_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv(bounds.JSON.variable, "1")
    path = tmp_path / name
    data = json.dumps([{"a": "x" * 1000}] * 1100).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UserMistake, match="AFTEROK_JSON_MIB raises it.*JSON Lines"):
        list(readers.records(path))
    if name == "r.json":
        with pytest.raises(UserMistake, match="AFTEROK_JSON_MIB raises it"):
            durable.read_json(path)


def test_a_table_above_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(bounds.CSV.variable, "1")
    (tmp_path / "t.csv").write_text("a,b\n" + "1,2\n" * (MIB // 4))
    with pytest.raises(UserMistake, match="AFTEROK_CSV_MIB raises it"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("levels", [200, 201])
def test_levels_of_json_are_bounded(levels, tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * levels + "]" * levels + "\n" + '{"a": "' + "[" * 1000 + '"}\n')
    first, second = readers.records(path)
    assert bool(first.problem) is (levels > 200) and not second.problem
    assert levels == 200 or "AFTEROK_JSON_DEPTH raises it" in first.problem


def test_digits_of_an_integer_are_bounded(tmp_path):
    path = tmp_path / "digits.jsonl"
    path.write_text("[" + "1" * 5000 + "]\n")
    (record,) = readers.records(path)
    assert "more than 4,300 digits" in record.problem and "PYTHONINTMAXSTRDIGITS raises it" in record.problem


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [" + ",".join([f"*a{n - 1}"] * 10) + "]\n" for n in range(1, 8)
)


@pytest.mark.parametrize("text, variable", [
    (BOMB, "AFTEROK_YAML_VALUES"), ("a: " + "[" * 101 + "]" * 101, "AFTEROK_YAML_DEPTH"),
    ("a: " + "[" * 60_000, "AFTEROK_YAML_DEPTH"), ("- " * 60_000 + "a", "AFTEROK_YAML_DEPTH"),
])  # fmt: skip
def test_yaml_is_bounded_in_levels_and_in_values_with_those_of_aliases(text, variable):
    with pytest.raises(yaml.YAMLError, match=f"{variable} raises it"):
        read_values(text)


def test_a_yaml_file_above_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(bounds.YAML.variable, "1")
    (tmp_path / "p.yaml").write_text("# " + "x" * MIB)
    with pytest.raises(UserMistake, match="AFTEROK_YAML_MIB raises it"):
        read_file(tmp_path / "p.yaml")


@pytest.mark.parametrize("text", ["!!int x", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000, "a: !!set [1]"])
def test_what_a_tag_makes_impossible_is_an_error_of_yaml(text):
    with pytest.raises(yaml.YAMLError):
        read_values(text)


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.csv", "f.parquet", "f.yaml"])
def test_a_pipe_is_refused_at_once(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises((UserMistake, OSError), match="no regular file"):
        if name.endswith("yaml"):
            load(read_file(tmp_path / name), yaml.SafeLoader)
        list(readers.records(tmp_path / name))
    with pytest.raises(durable.TornFile, match="no regular file"):
        durable.read_json(tmp_path / name)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "9" * 20])
def test_a_bound_is_a_whole_number(text, monkeypatch):
    monkeypatch.setenv(bounds.LINE.variable, text)
    with pytest.raises(UserMistake, match=f"variable {bounds.LINE.variable}: .* is no whole number from 1 on"):
        _ = bounds.LINE.most


def test_the_format_of_a_file_is_told_whatever_block_its_first_line_ends_in(tmp_path):
    for size in (shares.BLOCK - 10, shares.BLOCK - 9, shares.BLOCK - 8, 3 * shares.BLOCK):
        rows = [{"a": "x" * size}, {"a": "y"}]
        path = tmp_path / f"rows_{size}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [record.value for record in readers.records(path)] == rows


@pytest.mark.soak
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.jsonl.gz"])
@pytest.mark.parametrize("mib", [32, 256, 1024])
def test_the_time_of_a_line_is_linear_and_its_memory_bounded(mib, name, tmp_path, monkeypatch):
    """In a process of its own: each byte of the line takes 4 bytes of memory at most, of JSON in one piece 12."""
    path = long_line(mib * MIB - 64, name, tmp_path)
    raised = {1024: "1100"}.get(mib, "300")
    for bound in ("16", raised):
        child = os.fork()
        if not child:
            os.environ[bounds.LINE.variable] = os.environ[bounds.JSON.variable] = bound
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                count = len([len(record.value["a"]) for record in readers.records(path)])
                told = f"{count} records"
            except UserMistake as mistake:
                told = "refused" if "raises it" in str(mistake) else str(mistake)
            used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            seconds = time.process_time() - began
            with open(tmp_path / "told", "a") as file:
                file.write(f"{name} {mib} MiB, bound {bound} MiB: {told}, {seconds:.2f} s, {used:,.0f} MiB more\n")
            most = 12 if name.endswith(".json") else 4
            os._exit(0 if told == ("refused" if bound == "16" else "2 records") and used < most * mib else 1)
        assert os.waitpid(child, 0)[1] == 0, (tmp_path / "told").read_text()
    print((tmp_path / "told").read_text())
    path.unlink()


def test_the_manual_has_each_bound_with_its_default():
    manual = (Path(bounds.__file__).parents[1] / "README.md").read_text()
    rows = [line.split("|")[1:3] for line in manual.splitlines() if line.startswith("| `AFTEROK_")]
    told = {
        name.strip(" `"): int(most) for names, most in rows for name, most in zip(names.split(","), most.split(","))
    }
    assert told == {bound.variable: bound.default for bound in bounds.BOUNDS}


@pytest.mark.parametrize("said, told", [
    (b"x" * (MIB + 1), "AFTEROK_TEMPLATE_MIB raises it"), (b"\xff\xfe", "no text in UTF-8"), (None, "no regular file"),
])  # fmt: skip
@pytest.mark.parametrize("place", ["chat.template", "chat_template.jinja"])
def test_a_file_of_a_chat_template_is_bounded_text(place, said, told, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "mine.jinja" if place == "chat.template" else folder / place
    path.write_bytes(said) if said else os.mkfifo(path)
    with pytest.raises(UserMistake, match=told):
        tokenizer = load_tokenizer(str(folder))
        ChatRows(ChatConfig(template=str(path)), tokenizer, Encoder(tokenizer, "huggingface"))


@pytest.mark.parametrize("value", [5, {"a": 1}, [5], [{"name": "default"}], [{"name": "default", "template": 5}]])
def test_a_chat_template_of_another_type_is_a_mistake(value, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
    with pytest.raises(UserMistake, match="tokenizer_config.json: chat_template is .*mend"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("read", [
    bounds.open_regular, lambda pipe: bounds.read_bytes(pipe, bounds.JSON), read_file,
])  # fmt: skip
def test_a_pipe_is_told_by_its_name_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(bounds.NoFile) as told:
        read(tmp_path / "pipe")
    assert str(told.value) == f"{tmp_path}/pipe is no regular file: a pipe, a device or a folder"


@pytest.mark.parametrize("text", ["no", "nan", "1e400", "-1", "0x4", "٣", "9" * 400])
def test_the_memory_of_verifiers_is_a_number(text, monkeypatch):
    """Said where they are begun, and not by a traceback of theirs."""
    monkeypatch.setenv(process.MEMORY_VARIABLE, text)
    with pytest.raises(UserMistake, match="AFTEROK_VERIFIER_GIB: .* is no number of GiB"):
        process.Process("builtins:print", None)
    for good, gib in (("0", 0.0), ("0.5", 0.5), ("", process.MEMORY_GIB)):
        monkeypatch.setenv(process.MEMORY_VARIABLE, good)
        assert process.memory_gib() == gib
