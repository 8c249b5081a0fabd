"""The manuals keep their word: commands run or parse, YAML passes the schema, paths exist, the map is complete."""

import ast
import importlib.util
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_tools.base.yaml_loaders import read_values
from data_tools.mistake import Problem
from data_tools.own_packages import PACKAGES
from jobs.kind import kind_names
from jobs.schema.pipeline import load_pipeline
from launchers import cli
from megatron_ext import versions
from slurm.profile.layers import read_values as read_text
from slurm.profile.schema import Profile
from slurm.profile.typed import typed
from tests.command import ROOT, afterok
from tests.data_tools.chats import template_of, write_tokenizer
from tests.launchers.test_parallel_plan import NANO, PROFILE

README = ROOT / "README.md"
MANUALS = sorted(
    {README, *ROOT.glob(".github/*.md"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.md"))}
)
LANGUAGES = ("bash", "yaml", "python", "text", "console")
MOST_LINES = 160
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")

QUESTIONS = {  # what a newcomer asks, and the place that the map has to name
    "what makes a phase rerun?": "launchers/planning/reasons.py",
    "which states count as failed?": "launchers/causes/states.py",
    "which layout has gpt-oss qkv?": "megatron_ext/models/gpt_oss/weight_layout.py",
    "how is qkv laid out?": "megatron_ext/models/layouts.py",
    "where would I add a phase?": "jobs/phases",
    "where would I add a task?": "data_tools/tasks",
    "where would I add a family?": "megatron_ext/models/registry.py",
    "where is the dependency string of sbatch built?": "launchers/backends/slurm.py",
    "what does a 262k pack cost?": "megatron_ext/preflight/memory.py",
    "what is written when a rank is killed?": "launchers/backends/restart.py",
    "who decides whether a lost node is retried?": "jobs/retry.py",
    "where is a chat's loss mask made?": "data_tools/chats/encoder.py",
    "where are packs filled?": "data_tools/packs/best_fit.py",
    "where is the loss of GRPO?": "megatron_ext/rl/losses.py",
    "which file patches megatron-core?": "megatron_ext/device.py",
    "how does a profile map a role to a partition?": "slurm/profile/resolve.py",
    "how is a checkpoint published?": "megatron_ext/weights/checkpoint.py",
    "where does the sentence of `why` come from?": "launchers/observe/why.py",
    "where is it decided which jobs are sent?": "launchers/submission/decide.py",
    "who owns the names of the files of a run?": "jobs/artifacts/layout.py",
    "what reads a row of a Parquet file?": "data_tools/records/shares.py",
    "where is a setting's range declared and checked?": "data_tools/base/declared.py",
    "where are the settings of training?": "megatron_ext/training/settings.py",
    "where is the KV cache of rollouts?": "megatron_ext/rollout/cache.py",
}
WORDS = {
    "run", "phase", "element", "attempt", "restart", "link", "batch", "key", "seal", "lease", "submission", "part",
}  # fmt: skip


def fences(manual: Path) -> list[tuple[str, str]]:
    """Return (language, text) of each block of code."""
    return FENCE.findall(manual.read_text())


def prose(manual: Path) -> str:
    return FENCE.sub("", manual.read_text())


# -- commands ---------------------------------------------------------------------------------------------------------


def fenced_commands(manual: Path) -> Iterator[str]:
    """Yield the commands of bash blocks, and those behind a `$ ` of console blocks; continued lines are joined."""
    for language, text in fences(manual):
        lines = text.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if language in ("bash", "console"):
            yield from (line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def commands(manual: Path) -> list[list[str]]:
    """Return the words of every command of a manual, those within sentences too."""
    spoken = [span for span in SPAN.findall(prose(manual)) if span.split()[0] in RULES and " " in span]
    lines = [*fenced_commands(manual), *spoken]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def check(words: list[str]) -> None:
    """Fail where a command could not be typed like this, or where no rule says how to tell. Variables may stand before
    it."""
    words = words[next((place for place, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0) :]
    assert words[0] in RULES, f"no rule covers {shlex.join(words)!r}: write one into RULES, or take the command out"
    RULES[words[0]](words[1:])


def verbs() -> dict[str, object]:
    (group,) = (action for action in cli._parser()._actions if action.dest == "name")
    return dict(group.choices or {})


def check_afterok(words: list[str]) -> None:
    """Parse a command as `afterok` does; overrides of a pipeline that comes with afterok must be accepted by it."""
    if words[0] == "explain" and "explain" not in verbs():
        pytest.skip("this checkout has no `afterok explain` yet")
    assert words[0] in verbs(), f"afterok has no verb {words[0]!r}"
    if len(words) == 1:
        return  # a sentence speaks of the verb
    try:
        args, rest = cli._parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"afterok does not understand {shlex.join(words)!r}")
    assert all("=" in word and not word.startswith("-") for word in rest), f"{shlex.join(words)!r}: {rest}"
    overrides = [*getattr(args, "overrides", []), *rest]
    pipeline = getattr(args, "pipeline", None)
    if words[0] == "resubmit":
        pipeline = Path(f"jobs/pipelines/{args.run}.yaml")
        pipeline = pipeline if (ROOT / pipeline).exists() else None
    if pipeline is not None and str(pipeline) != "PIPELINE":
        shown = [text for _, text in yaml_blocks() if f"name: {pipeline.stem}\n" in text]
        if (ROOT / pipeline).exists() or not shown:
            load_pipeline(ROOT / pipeline, overrides)
        else:  # one that a manual shows
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / pipeline.name).write_text(shown[0])
                load_pipeline(Path(folder) / pipeline.name, overrides)


def check_python(words: list[str]) -> None:
    words = [word for word in words if word != "-P"]
    assert words[0] == "-m", words
    module, rest = words[1], words[2:]
    if module == "pytest":
        return check_pytest(rest)
    if module in ("tests.benchmarks.NAME", "zipfile"):
        return
    check_options(module, rest)


def check_options(module: str, words: list[str]) -> None:
    """A module of ours exists, and its text has each option."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, f"there is no module {module}"
    text = Path(spec.origin).read_text()
    if module.startswith("megatron_ext.entrypoints."):
        text += (ROOT / "megatron_ext/entrypoints/bare.py").read_text()
    for word in words:
        assert not word.startswith("-") or f'"{word}"' in text, f"{module} has no option {word}"


def check_pytest(words: list[str]) -> None:
    while words:
        word, words = words[0], words[1:]
        if word in ("-n", "--dist", "-m"):
            words = words[1:]
        else:
            assert (ROOT / word).exists(), word


def check_pip(words: list[str]) -> None:
    if words[0] == "download":
        assert not {word for word in words[1:] if word.startswith("-")} - set(
            shlex.split((ROOT / ".ci/run").read_text(), comments=True)
        )
        return
    assert words[0] == "install", words
    extras = re.findall(r"^        \"(\w+)\": \[", (ROOT / "setup.py").read_text(), re.M)
    for word in words[1:]:
        named = re.fullmatch(r"(?:\.|afterok)(?:\[(\w+)\])?", word)
        if named:
            assert named[1] is None or named[1] in extras, f"setup.py has no extra {named[1]}"
        else:
            assert word in ("-c", "-e") or (ROOT / word).exists(), word


def check_torchrun(words: list[str]) -> None:
    place = words.index("-m")
    check_options(words[place + 1], words[place + 2 :])


def check_apt_get(words: list[str]) -> None:
    packages = [word for word in words if not word.startswith("-") and word != "install"]
    assert packages and all(package in (ROOT / ".ci/run").read_text() for package in packages)


def check_ci(words: list[str]) -> None:
    assert not words and os.access(ROOT / ".ci/run", os.X_OK)


def another_program(words: list[str]) -> None:
    """Programs that are not ours: nothing to hold them to."""


RULES: dict[str, Callable[[list[str]], None]] = {
    "afterok": check_afterok,
    "python": check_python,
    "pip": check_pip,
    "torchrun": check_torchrun,
    "apt-get": check_apt_get,
    ".ci/run": check_ci,
    "sbatch": another_program,
    "sh": another_program,
    "hf": another_program,
    "ruff": another_program,
    "mypy": another_program,
}


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_can_be_typed_like_this(manual):
    assert {language for language, _ in fences(manual)} <= set(LANGUAGES), "a block of code names its language"
    skipped = None
    for words in commands(manual):
        try:
            check(words)
        except pytest.skip.Exception as reason:
            skipped = reason
    if skipped:
        raise skipped


@pytest.mark.parametrize("verb", cli.EXAMPLES)
def test_every_verb_has_an_example_that_can_be_typed(verb):
    assert set(cli.EXAMPLES) == set(verbs())
    for example in cli.EXAMPLES[verb].split("; "):
        assert example.split()[:2] == ["afterok", verb]
        check(shlex.split(example))


@pytest.mark.parametrize("command, said", [
    ("frobnicate --now", "no rule covers"),
    ("afterok pln jobs/pipelines/tiny.yaml", "no verb 'pln'"),
    ("afterok status --wach", "--wach"),
    ("afterok plan jobs/pipelines/tiny.yaml sft.with.lrr=1", "lrr"),
    ("python -m tests.benchmarks.loss_head --repeat 1", "no option --repeat"),
    ("python -m pytest tests/nowhere", "tests/nowhere"),
    ("pip install -e '.[tset]'", "no extra tset"),
])  # fmt: skip
def test_a_command_that_is_wrong_or_that_no_rule_covers_fails(tmp_path, command, said):
    manual = tmp_path / "README.md"
    manual.write_text(f"```bash\n{command}     # a comment\n```\n")
    (words,) = commands(manual)
    with pytest.raises((Exception, pytest.fail.Exception), match=re.escape(said)):
        check(words)


def needs_nothing(words: list[str]) -> bool:
    """Whether a command can be run here and now: it reads nothing that is not in the checkout, and starts nothing."""
    if words[0] != "afterok":
        return False
    if words[1] == "plan":
        return "jobs/pipelines/tiny.yaml" in words or "--from-megatron" in words
    if words[1] == "explain":
        return len(words) == 2 or words[2] in kind_names()
    return "--help" in words


CHEAP = sorted({shlex.join(words[1:]) for manual in MANUALS for words in commands(manual) if needs_nothing(words)})


@pytest.mark.parametrize("command", CHEAP)
def test_a_command_that_needs_nothing_runs(tmp_path, command):
    words = shlex.split(command)
    if words[0] == "explain" and "explain" not in verbs():
        pytest.skip("this checkout has no `afterok explain` yet")
    if "jobs/pipelines/tiny.yaml" in words:
        words += ["--run", str(tmp_path / "run"), "cluster=local"]
    assert afterok(*words).stdout.strip()


@pytest.mark.skipif(versions.installed() != "0.16.1", reason="the manual shows what is refused under 0.16.1")
def test_the_parallel_plan_of_the_manual_is_refused_as_it_says(tmp_path):
    """The command of the manual, with a config.json in place of the 30B model."""
    (text,) = [text for language, text in fences(ROOT / "megatron_ext/README.md") if language == "console"]
    (command,) = [line for line in fenced_commands(ROOT / "megatron_ext/README.md") if line.startswith("afterok plan")
                  and "context_comm" in line]  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(NANO))
    (tmp_path / "h100.yaml").write_text(PROFILE)
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n')
    here = [f"params.inputs=[{tmp_path / 'data.jsonl'}]", f"params.model={tmp_path / 'model'}",
            f"params.tokenizer={write_tokenizer(tmp_path / 'tokenizer', template_of('nemotron_3_nano'))}",
            f"cluster={tmp_path / 'h100.yaml'}", "--run", tmp_path / "run"]  # fmt: skip
    done = afterok(*shlex.split(command)[1:], *here, check=2)
    said = " ".join((done.stdout + done.stderr).split())
    _, shown = text.replace("\\\n", " ").split("\n", 1)
    for line in shown.replace("\n    ", " ").splitlines():
        assert " ".join(line.removeprefix("afterok: openresearcher.yaml: ").split()) in said, line


def test_ci_runs_the_readmes_test_command():
    lines = re.findall(r"^pip install .*$", README.read_text(), re.M)
    assert lines[0] == "pip install -c constraints.txt -e . && afterok run jobs/pipelines/tiny.yaml"
    assert lines[1] in (ROOT / ".ci/run").read_text()


# -- YAML and Python --------------------------------------------------------------------------------------------------


def yaml_blocks() -> list[tuple[str, str]]:
    return [(str(path.relative_to(ROOT)), text) for path in MANUALS for kind, text in fences(path) if kind == "yaml"]


def pipeline_of(text: str) -> str:
    """A pipeline's text: the block itself, or its phases with a stand-in for each phase that they refer to."""
    block = read_values(text)
    if "phases" in block:
        return text
    assert all("uses" in phase for phase in block.values()), "a YAML block is a pipeline, or phases of one"
    missing = {name for name in re.findall(r"\$\{phases\.(\w+)\.out\}", text) if name not in block}
    stand_ins = "".join(f"  {name}: {{uses: q_rewards, with: {{inputs: [x.csv]}}}}\n" for name in sorted(missing))
    return "name: block\nphases:\n" + stand_ins + "".join(f"  {line}\n" for line in text.splitlines())


@pytest.mark.parametrize("where, text", yaml_blocks())
def test_every_yaml_block_passes_the_schema(tmp_path, where, text):
    (tmp_path / "block.yaml").write_text(text)
    if set(read_values(text)) & {"roles", "partitions", "policy", "mail"}:  # a profile; what it extends is the reader's
        problems: list[Problem] = []
        typed(Profile, read_text(tmp_path / "block.yaml", problems), file="block.yaml", at="", problems=problems)
        assert not problems, where
        return
    (tmp_path / "block.yaml").write_text(pipeline_of(text))
    assert load_pipeline(tmp_path / "block.yaml").phases, where


def test_the_readmes_pipeline_can_be_planned(tmp_path):
    (text,) = [text for language, text in fences(README) if language == "yaml"]
    (tmp_path / "small.yaml").write_text(text)
    done = afterok("plan", tmp_path / "small.yaml", "--run", tmp_path / "run", "cluster=local")
    assert done.stdout.count("never ran in this run") == len(read_values(text)["phases"])


def test_every_block_of_python_is_python():
    for manual in MANUALS:
        for language, text in fences(manual):
            assert language != "python" or ast.parse(text).body


# -- paths, links and the map -----------------------------------------------------------------------------------------


def slugs(manual: Path) -> set[str]:
    """The anchors that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(manual), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(manual):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(manual)):
        path, _, anchor = link.partition("#")
        target = (manual.parent / path).resolve() if path else manual
        assert target.exists(), f"{link}: no {target}"
        assert not anchor or anchor in slugs(target), f"{link}: no such heading"


def of_others(text: str) -> Iterator[str]:
    """The first cells of tables whose last column is "here": they name files of other projects."""
    ours = True
    for line in text.splitlines():
        if line.endswith("| here |"):
            ours = False
        elif not line.startswith("|"):
            ours = True
        if not ours:
            yield line.split("|")[1]


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_is_named_exists(manual):
    text = prose(manual)
    foreign = {span for cell in of_others(text) for span in SPAN.findall(cell)}
    for span in set(SPAN.findall(text)) - foreign:
        if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)+\.(py|yaml|md)|\w+(/\w+)*/", span):
            assert (ROOT / span).exists() or (manual.parent / span).exists(), span
        elif re.fullmatch(r"\w+\.py", span):
            name = span if span != "__init__.py" else "data_tools/__init__.py"
            assert any(manual.parent.rglob(name)) or span in foreign or "/" in name, span


def the_map() -> dict[str, str]:
    """Return the map's lines of each top-level folder."""
    (text,) = [text for language, text in fences(README) if language == "text"]
    parts = re.split(r"^(\w+)/", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def places(package: str, text: str) -> tuple[set[Path], list[str]]:
    """Return what one part of the map names, and names of what is not there.

    A file lies in the package, in one of the folders at the beginning of its line, or of the line that it continues.
    """
    folders: list[str] = []
    named, absent = set(), []
    for line in text.splitlines()[1:]:
        left = re.match(r"  (\S+(?:  \S+)*)", line)
        if left:
            folders = [name for name in left[1].split() if name.endswith("/")]
        for name in re.findall(r"(?<![\w/])\w[\w/]*(?:\.py|/)(?![\w/])", line):
            tried = [ROOT / package / folder / name for folder in ["", *folders]]
            there = [path for path in tried if path.exists()]
            named.update(there[:1])
            absent += [] if there else [name]
    return named, absent


def test_the_map_names_every_top_level_module_and_folder_and_nothing_else():
    parts = the_map()
    assert set(parts) == {*PACKAGES, "tests"}
    for package in PACKAGES:
        named, absent = places(package, parts[package])
        assert not absent, f"the map's {package}/ names what does not exist: {', '.join(absent)}"
        for path in (ROOT / package).iterdir():
            is_module = path.suffix == ".py" and path.name != "__init__.py"
            is_folder = path.is_dir() and any(path.glob("*.*")) and not path.name.startswith(("_", "."))
            assert not (is_module or is_folder) or path in named, f"the map does not name {path.relative_to(ROOT)}"


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_map_answers_a_newcomers_question(question):
    package, _, _ = QUESTIONS[question].partition("/")
    assert ROOT / QUESTIONS[question] in places(package, the_map()[package])[0]


def test_the_readme_is_a_door():
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert set(re.findall(r"^\* \*\*(\w+)\*\*:", text, re.M)) == WORDS
    for package in PACKAGES:
        assert f"({package}/README.md)" in text
