"""Nothing that afterok prints holds a control character or is taken for markup, whatever rows, names and paths hold."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_tools.base import printing
from data_tools.base.tables import read_tables, write_table
from launchers.cli import main
from launchers.observe import show
from launchers.observe.status import PhaseStatus, RunStatus
from tests.command import ROOT

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EVIL = (
    "\x1b]0;owned\x07\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202edrow\u2066\r[/bold][red]x[/nope]:smile:[link=file:///]"
)
PHASE = f"""
from dataclasses import dataclass, field
from data_tools.mistake import UserMistake
from data_tools.base.tables import write_table
EVIL = {EVIL!r}

@dataclass
class Config:
    rows: list[str] = field(default_factory=list, metadata={{"input": True}})
    note: str = ""
    fail: str = ""

def run(config, task):
    print("log", EVIL, flush=True)
    task.progress(1, 2, EVIL, EVIL)
    if config.fail == "mistake":
        raise UserMistake(f"row {{EVIL}}: wrong\\nafterok: all is well")
    if config.fail:
        raise RuntimeError(EVIL)
    write_table(task.keep, "t", EVIL, [EVIL, "n"], [[EVIL, 1]])
    (task.out / "x").write_text("x")
    return {{"headline": EVIL, EVIL: EVIL}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project whose run's path, rows' file, settings, facts, tables, progress and errors are all EVIL."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / "evil").mkdir()
    (folder / "evil" / "phase.py").write_text(PHASE)
    (folder / EVIL.replace("/", "|")).write_text("{}")
    rows = json.dumps([EVIL.replace("/", "|")])
    phases = {
        "good": {"uses": "evil.phase", "with": {"rows": json.loads(rows), "note": EVIL}},
        "bad": {"uses": "evil.phase", "with": {"fail": "mistake"}},
        "ugly": {"uses": "evil.phase", "with": {"fail": "exception"}},
    }
    (folder / "p.yaml").write_text(json.dumps({"name": "evil", "phases": phases}))
    (folder / "profile[x].yaml").write_text(
        json.dumps({"kind": "local", "meta": {"contact": EVIL, "name": EVIL}, "roles": {"cpu": {}, "train": {}}})
    )
    return folder


RUN = "runs/" + EVIL.replace("/", "|")
VERBS = [["plan", "p.yaml", "--run", RUN], ["plan", "p.yaml", "cluster=./profile[x].yaml", "--run", RUN],
         ["plan", "p.yaml", f"good.with.note={EVIL}\x1b", "--run", RUN], ["plan", "p.yaml", f"{EVIL}=1"],
         ["plan", f"{EVIL}.yaml"], ["submit", "p.yaml", "--dry-run", "--run", RUN], ["status", RUN], ["why", RUN],
         ["why", RUN, EVIL], ["why", RUN, "bad"], ["ls", "runs"], ["ls", EVIL], ["logs", RUN, "good"],
         ["logs", RUN, EVIL], ["logs", RUN, "ugly"], ["inspect", RUN, EVIL], ["cancel", RUN], ["cancel", RUN, EVIL],
         ["repair", RUN], ["resubmit", RUN, EVIL], ["status", EVIL], [EVIL], ["plan", f"--{EVIL}"]]  # fmt: skip


@pytest.fixture(scope="module")
def evil(folder):
    done = subprocess.run(
        [sys.executable, "-m", "launchers.cli", "run", "p.yaml", "cluster=local", "--run", "runs/r"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert b"Traceback" not in done.stderr and done.returncode in (1, 2), done.stderr
    (folder / "runs" / "r").rename(folder / RUN)  # as anybody may who shares the folder
    return folder, done.stdout.decode() + done.stderr.decode()


def test_a_run_prints_no_control_character(evil):
    _, printed = evil
    assert "good: COMPLETED" in printed and "[/bold][red]x[/nope]:smile:" in printed and "owned" in printed
    assert not CONTROL.search(printed)
    assert not [line for line in printed.splitlines() if line.startswith("afterok: all is well")]


def test_a_traceback_that_nobody_caught_is_cleaned_too_and_a_reader_that_left_is_no_error(evil):
    code = (
        f"from launchers import cli\nfrom launchers.verbs import runs\ndef bad(args): raise RuntimeError({EVIL!r})\n"
        "runs.do_ls = bad\ncli.main(['ls'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "RuntimeError: ]0;owned" in done.stderr and not CONTROL.search(done.stderr) and done.returncode == 1
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "launchers.cli", "ls", evil[0] / "runs"],
            cwd=ROOT,
            stdout=gone,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("words", VERBS, ids=range(len(VERBS)))
def test_no_verb_prints_a_control_character_or_reads_markup(evil, monkeypatch, capsys, words, as_json):
    monkeypatch.chdir(evil[0])
    try:
        main([*words, *(["--json"] if as_json else [])])
    except SystemExit as end:  # argparse's own
        assert end.code == 2
    out, err = capsys.readouterr()
    assert out + err and not CONTROL.search(out + err)
    assert "MarkupError" not in err and "Traceback" not in err
    assert not [line for line in (out + err).splitlines() if line.startswith("afterok: all is well")]
    if as_json and out:
        json.loads(out)


@pytest.mark.parametrize("value", ["²", "٣", "0", "-5", "1", "9" * 30, "", " 80", "x", "\udcff"])
@pytest.mark.parametrize("name", ["COLUMNS", "LINES", "TERM", "COLORTERM", "FORCE_COLOR", "NO_COLOR", "JUPYTER_COLUMNS",
                                  "JUPYTER_LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LANG", "TZ"])  # fmt: skip
def test_nothing_that_a_terminal_says_of_itself_keeps_a_table_from_being_printed(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    show.console().print(show.table(["phase"], [["sft"]]))
    assert "sft" in capsys.readouterr().out


def test_an_inspection_shows_text_of_rows_as_text(capsys):
    document = {
        "where": EVIL,
        "tokens": 2,
        "supervised": 1,
        "spans": [{"text": EVIL, "trained": True}, {"text": "a\tb\n", "trained": False}],
    }
    show.print_inspection(
        {
            "phase": EVIL,
            "title": EVIL,
            "balance": {"columns": [EVIL], "rows": [[EVIL]], "title": EVIL},
            "lengths": [(1, 2, 1, 2)],
            "documents": [document],
            "limit": 2,
        }
    )
    out = capsys.readouterr().out
    assert out.count("[/bold][red]x[/nope]:smile:[link=file:///]") == 7 and not CONTROL.search(out)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.text(max_size=30) | st.text("\x1b\x07\x9b\u202e[]/0;mA\r\n\t:\\", max_size=30))
def test_on_a_terminal_only_our_own_colours_are_escape_sequences(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        patch.setenv("TERM", "xterm-256color")
        console = show.console()
        console.print(show.table([text, "state"], [[text, "COMPLETED"], ["FAILED", text]], title=text))
        console.print(text, style="bold")
        shown = sys.stdout.getvalue()
    assert not CONTROL.search(re.sub(r"\x1b\[[0-9;]*m", "", shown))
    assert CONTROL.search(shown)  # green and red are still there


@given(st.text() | st.text("\x1b\x9b\u202e\r\n\t", max_size=9))
def test_json_for_people_says_the_same_and_holds_no_control_character(text):
    printed = printing.json_text({text: [text]})
    assert json.loads(printed) == {text: [text]} and not CONTROL.search(printed)
    assert not CONTROL.search(printing.clean(text)) and printing.clean("a\tü\n日") == "a\tü\n日"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1023, "1,023 bytes"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"),
     (3.5 * 2**20, "3.5 MiB"), (2**30, "1.0 GiB"), (2**50, "1,024.0 TiB")],
)  # fmt: skip
def test_a_size_has_the_unit_that_it_is_read_in(size, text):
    assert printing.size_text(size) == text


def test_what_is_no_table_is_left_out(tmp_path):
    write_table(tmp_path, "whole", "t", ["x"], [[1]])
    table = tmp_path / "tables" / "odd.json"
    whole = {"title": "t", "columns": ["x"], "rows": [[1]]}
    odd = [
        [],
        5,
        {"title": "t"},
        whole | {"title": 1},
        whole | {"columns": 5},
        whole | {"rows": 5},
        whole | {"rows": [5]},
    ]
    for text in ("{", *map(json.dumps, odd)):
        table.write_text(text)
        assert list(read_tables(tmp_path)) == ["whole"], text


def test_a_table_without_rows_is_left_out_of_the_summary(capsys):
    empty, full = (
        {"title": title, "columns": ["a column of some width"], "rows": rows}
        for title, rows in (("empty", []), ("full", [[1]]))
    )
    phase = PhaseStatus("packs", "COMPLETED", 1, 1, tables={"idle": empty, "balance": full})
    show.console().print(show.summary(RunStatus("run", 1, [phase])))
    told = " ".join(capsys.readouterr().out.split())
    assert "packs: full" in told and "packs: empty" not in told


@pytest.mark.parametrize("width", [20, 40, 60, 80, 160])
def test_a_table_on_a_terminal_never_folds_a_short_cell(width):
    rows = [["small", "COMPLETED", "1/1", "330,240 parameters, vocabulary 259 " * 3], ["kept", "FAILED", "0/1", ""]]
    told = io.StringIO()
    console = Console(file=told, width=width, force_terminal=True, no_color=True)
    console.print(show.table(["phase", "state", "sealed", ""], rows, title="a run"))
    shown = told.getvalue()
    assert all(cell in shown for row in rows for cell in row[:3])
    assert ("state: FAILED" in shown) == (width < 60)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_written_as_its_number(monkeypatch, encoding):
    told = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", told)
    with printing.clean_streams():
        print("cure it \u2192 submit \udcff")
        sys.stdout.flush()
    said = told.buffer.getvalue().decode(encoding)
    assert said.startswith("cure it ") and ("\u2192" if encoding == "utf-8" else "\\u2192") in said and "udcff" in said
