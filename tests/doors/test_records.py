"""Rows of data: conversations, tasks' rows, prompts, samples; and what holds them: JSON Lines, JSON, Parquet, CSV."""

import contextlib
import gzip
import io
import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.chats.conversation import REFUSED, BadRecord, read_record
from data_tools.chats.messages import IN_LOSS, WITHOUT_MEANING
from data_tools.chats.samples import problem_of_sample
from data_tools.packs.materialize import Config, Malformed, _Rows
from data_tools.packs.materialize import Refused as RefusedRow
from data_tools.records import readers
from data_tools.records.csv_tables import read_table
from data_tools.tasks.task import load_row_task, rows_of
from tests.data_tools.chats import write_tokenizer
from tests.data_tools.conversations import RECORDS
from tests.doors.damage import damaged
from tests.doors.sweep import Door, Refused, check, counts


def strict(data: bytes):
    """JSON as its standard has it, every member of an object counted: what stands twice is no object."""
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=lambda pairs: ["object", *sorted(pairs, key=str)])


READ = {  # the columns of a record that say what is trained; of the others data sets have any
    *("messages", "traj", "conversations", "conversation", "tools", "functions", "system", "system_prompt", "history"),
    *("instruction", "input", "output", "question", "answer", "prompt", "completion", "query", "response", "problem"),
    *("deepseek_reasoning", "deepseek_solution", "chat_template_kwargs", *REFUSED, *IN_LOSS),
}


def trained(data: bytes):
    """What of a record can change what is trained; null is absent, as Parquet spells it, as is an empty list."""
    absent = [(key, none) for key in ("tool_calls", "function_calls", "content", "tools") for none in ("", [])]
    absent += [("type", "function")]  # of a call, which has no other

    def said(value, depth=0):
        if isinstance(value, str) and value[:1] in ("[", "{"):
            with contextlib.suppress(ValueError):
                value = strict(value.encode())  # JSON as text is read as what it says
        if value in ("output_text", "input_text"):
            return "text"
        if isinstance(value, str):  # white space around the markers of a thought says nothing
            return re.sub(r"\s*(<\|\w+\|>)\s*", r"\1", value)
        if not isinstance(value, list) or value[:1] != ["object"]:
            return [said(item, depth + 1) for item in value] if isinstance(value, list) else value
        empty = ("", None) if depth else (None,)  # a message's empty text is none
        pairs = [(key, said(item, depth + 1)) for key, item in value[1:] if item not in empty]
        pairs = [pair for pair in pairs if pair not in absent]
        return [pair for pair in pairs if pair[0] in READ or depth and pair[0] not in WITHOUT_MEANING]

    return said(strict(data))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return _Rows(Config(tokenizer=str(folder), on_bad_row="bucket", encoder="huggingface"))


def one_line(data: bytes, draw: random.Random):
    """Damage of a line: a share cuts the others off."""
    how, data = damaged(data, draw)
    return how, data.replace(b"\n", b" ")


@counts
def test_rows_of_conversations(cases, rows, record):
    def read(data):
        line = rows._line(data)
        if isinstance(line, Malformed):
            raise Refused(line.reason or line.bucket)
        if refused := [row for row in line if isinstance(row, RefusedRow)]:
            raise Refused(refused[0].reason or refused[0].bucket)
        return [(row.ids.tolist(), row.mask.tolist()) for row in line]

    def readable(data):
        try:
            return bool(read(data))
        except Refused:
            return False

    written = [json.dumps(value).encode() for value, _ in RECORDS.values() if "chat_template_kwargs" not in value]
    inputs = [data for data in written if readable(data)]
    assert len(inputs) > 8
    check(Door("rows", inputs, read, trained, damage=one_line), cases, record)


@counts
def test_conversations_of_every_schema(cases, record):
    def read(data):
        found = readers.record_of(data)
        if found.problem or found.is_blank:
            raise Refused(found.problem or "blank")
        return [repr(item) for item in read_record(found.value)]

    inputs = [json.dumps(value).encode() for value, _ in RECORDS.values()]
    check(Door("conversations", inputs, read, trained, refused=(BadRecord,), damage=one_line), cases, record)


@counts
def test_rows_of_a_task(cases, record):
    task = load_row_task("calculator")

    def read(data):
        try:
            return [repr(row) for row in rows_of(task, data)]
        except ValueError as error:
            raise Refused(str(error)) from None

    def told(data):  # the task reads the calls of the calculator, and nothing else of a row
        answers = [value for key, value in strict(data)[1:] if key == "answer"]
        return re.findall(r"<<(.*?)>>", answers[0]) if len(answers) == 1 else answers

    inputs = [
        b'{"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\\n#### 4"}',
        b'{"answer": "<<48/2=24>>24 <<24+1=25>>25"}',
    ]
    check(Door("rows of a task", inputs, read, told, damage=one_line), cases, record)


SAMPLE = {"prompt_id": 7, "prompt": "2+2?", "completion": "4", "finish": "stop", "tokens": 1, "correct": True,
          "reward": 0.5, "sample": 3, "seed": 1, "weights": "w", "sampling": {"temperature": 1.0}}  # fmt: skip


@counts
def test_samples_of_models(cases, record):
    def read(data):
        found = readers.record_of(data)
        if problem := found.problem or ("blank" if found.is_blank else "") or problem_of_sample(found.value):
            raise Refused(problem)
        assert json.loads(found_line := readers.json_line(found.value)) == found.value or "NaN" in found_line
        return {key: found.value.get(key) for key in SAMPLE}

    def told(data):
        return {key: value for key, value in strict(data)[1:] if key in SAMPLE and value is not None}

    chat = {key: value for key, value in SAMPLE.items() if key != "prompt"}
    chat["messages"] = [{"role": "user", "content": "2+2?"}]
    inputs = [json.dumps(SAMPLE).encode(), json.dumps({**chat, "correct": None}).encode()]
    check(Door("samples", inputs, read, told, damage=one_line), cases, record)


def file_door(name, folder, file, inputs, told, read=None):
    """A door that reads the records of a file."""
    path = folder / file

    def read_file(data):
        path.write_bytes(data)
        found = list(readers.records(path))
        if bad := next((record for record in found if record.problem), None):
            raise bad.mistake()
        return [record.value for record in found if not record.is_blank]

    return Door(name, inputs, read or read_file, told)


ROWS = [{"question": f"{n}?", "answer": "x" * n, "n": n, "deep": {"a": [1.5, None, True]}} for n in range(6)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@counts
def test_json_lines(cases, tmp_path, record):
    def told(data):
        return [strict(line) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]

    check(file_door("JSON Lines", tmp_path, "rows.jsonl", [LINES], told), cases, record)


@counts
def test_one_piece_of_json(cases, tmp_path, record):
    inputs = [json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1).encode(), json.dumps(ROWS[0]).encode()]
    check(file_door("JSON", tmp_path, "rows.json", inputs, strict), cases, record)


@counts
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_packed_lines(cases, kind, tmp_path, record):
    import zstandard

    pack = gzip.compress if kind == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress

    def told(data):
        unpacked = (
            gzip.decompress(data) if kind == "gz" else zstandard.ZstdDecompressor().decompressobj().decompress(data)
        )
        return [strict(line) for line in unpacked.split(b"\n") if line.strip()]

    check(file_door(f"packed lines ({kind})", tmp_path, f"rows.jsonl.{kind}", [pack(LINES)], told), cases, record)


def parquet(rows, **how):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3, **how)
    return file.getvalue()


@counts
def test_parquet(cases, tmp_path, record):
    def without_nulls(value):
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    def told(data):
        return without_nulls(pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist())

    inputs = [parquet(ROWS), parquet(ROWS, compression="zstd", use_dictionary=False),
              parquet(ROWS, data_page_version="2.0", compression="none")]  # fmt: skip
    check(file_door("Parquet", tmp_path, "rows.parquet", inputs, told), cases, record)


TABLE = (
    b"prompt,q_action_0,q_action_1,note\n"
    b'"a, b",0.5,1,plain\n'
    b'c,-1e-3,2.25,"two\nlines"\n'
    b'd,0,3,"with ""quotes"""\n'
)  # fmt: skip


@counts
def test_csv(cases, tmp_path, record):
    import csv

    def read(data):
        (tmp_path / "t.csv").write_bytes(data)
        table = read_table(tmp_path / "t.csv")
        return [table.columns, table.rows, table.floats(table.numbered("q_action_")).tolist()]

    def told(data):
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
        return [rows[0], rows[1:], [[float(row[1]), float(row[2])] for row in rows[1:]]]

    check(Door("CSV", [TABLE], read, told), cases, record)
