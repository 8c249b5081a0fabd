"""Prompts come in exact shares, each once an epoch, and prompt k is the same whenever and wherever it is asked for."""

import csv
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.chats.char_tokenizer import write_char_tokenizer
from data_tools.mistake import UserMistake
from data_tools.records.hub import missing
from data_tools.tasks.calculator import ALPHABET
from data_tools.tasks.mix import (
    Entry,
    Mix,
    MixConfig,
    check_mix,
    counts_table,
    datasets,
    entries_of,
    load,
    load_items,
    number_of,
    turn_ends,
)
from data_tools.tasks.task import Item, Source, check_task, task_names
from tests.data_tools.chats import write_tokenizer
from tests.data_tools.conftest import build

HERE = "tests.data_tools.tasks.verifiers"


def made(shares: dict[str, tuple[int, float]], seed: int = 0, **more: Entry) -> Mix:
    """name → (prompts, weight)"""
    entries = {name: Entry("calculator", weight=weight) for name, (_, weight) in shares.items()} | more
    items = {
        name: [Item(f"{name}/{place}", str(place)) for place in range(count)] for name, (count, _) in shares.items()
    }
    return Mix(entries, seed, items | {name: [Item("never", "never")] for name in more})


shares = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 9), st.floats(0.01, 10)), min_size=1)


@settings(max_examples=60)
@given(shares, st.integers(0, 2**40), st.integers(1, 400))
def test_every_prompt_once_an_epoch_and_weights_exact_over_every_prefix(shares, seed, length):
    mix = made(
        shares, seed, only=Entry("calculator", weight=5.0, evaluation_only=True), none=Entry("calculator", weight=0.0)
    )
    total = sum(weight for _, weight in shares.values())
    drawn = {name: [] for name in shares}
    for k in range(length):
        draw = mix.draw(k)
        drawn[draw.entry].append(draw)
        for name, (_, weight) in shares.items():
            assert abs(len(drawn[name]) - (k + 1) * weight / total) < 1 + 1e-6
    for name, draws in drawn.items():
        count = shares[name][0]
        for start in range(0, len(draws), count):
            epoch = draws[start : start + count]
            assert {draw.epoch for draw in epoch} == {start // count}
            uids = [draw.item.uid for draw in epoch]
            assert len(set(uids)) == len(uids) and (
                len(uids) < count or set(uids) == {f"{name}/{i}" for i in range(count)}
            )


@settings(max_examples=30)
@given(shares, st.integers(0, 1000), st.lists(st.integers(0, 5000), min_size=1, max_size=8))
def test_prompt_k_does_not_depend_on_what_was_asked_before(shares, seed, places):
    assert [made(shares, seed).draw(k) for k in places] == [mix.draw(k) for mix in [made(shares, seed)] for k in places]


def test_epochs_are_in_other_orders_and_prompts_have_other_noise():
    mix = made({"a": (50, 1.0)})
    first, second = ([mix.draw(k) for k in range(start, start + 50)] for start in (0, 50))
    assert [draw.item for draw in first] != [draw.item for draw in second]
    assert len({draw.number for draw in first + second}) == 100
    assert [draw.item for draw in first] != [made({"a": (50, 1.0)}, seed=1).draw(k).item for k in range(50)]


def test_the_order_is_the_one_that_runs_began_with():
    """Golden: a change here changes what runs resumed after it train on."""
    mix = made({"a": (5, 1.0), "b": (3, 0.45)}, seed=7)
    assert [mix.draw(k).item.uid for k in range(8)] == GOLDEN
    assert number_of("gsm8k/00", 1) == NUMBER


GOLDEN = ["a/4", "a/2", "b/0", "a/3", "a/1", "b/1", "a/0", "a/3"]
NUMBER = 15567177774316879867


def test_a_digest_tells_other_prompts_weights_and_seeds():
    base = made({"a": (5, 1.0), "b": (3, 0.45)})
    same = made({"a": (5, 1.0), "b": (3, 0.45)}, only=Entry("calculator", evaluation_only=True))
    others = [
        made({"a": (6, 1.0), "b": (3, 0.45)}),
        made({"a": (5, 1.0), "b": (3, 0.5)}),
        made({"a": (5, 1.0), "b": (3, 0.45)}, 1),
    ]
    assert base.digest == same.digest and base.digest not in [other.digest for other in others]


def test_the_digest_of_scoring_tells_other_answers_columns_and_code_and_is_no_chance(tmp_path, monkeypatch):
    class Value:  # which calls itself by its place in memory
        pass

    def scoring(answer=1, columns=MappingProxyType({}), uid="a/0", task="calculator"):
        mix = Mix({"a": Entry(task)}, 0, {"a": [Item(uid, "?", answer, columns)]})
        return mix.scoring([mix.held_out("a", 0)])

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_scored.py").write_text("def score(item, completion): return 0\n")
    own = scoring(task="mine_scored:score")
    (tmp_path / "mine_scored.py").write_text("def score(item, completion): return 1\n")
    found = [scoring(), scoring(2), scoring("1"), scoring(columns={"q": 1.5}), scoring(uid="a/1"), scoring(Value()),
             own, scoring(task="mine_scored:score")]  # fmt: skip
    assert len(set(found)) == len(found)
    assert scoring(Value()) == scoring(Value())
    assert scoring(columns={"b": 1, "a": 2}) == scoring(columns={"a": 2, "b": 1})


def test_files_of_every_form_give_the_same_prompts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{n}?", "answer": str(n)} for n in (3, 1, 3, 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    for suffix in ("jsonl", "json", "parquet", "csv"):
        items = load_items("mine", Entry(f"{HERE}:length", source=Source(inputs=[str(tmp_path / f"a.{suffix}")])))
        assert [(item.prompt, item.answer) for item in items] == [("3?", "3"), ("1?", "1"), ("2?", "2")], suffix
        assert all(item.uid.startswith("mine/") for item in items)
        limited = load_items(
            "mine", Entry(f"{HERE}:length", limit=2, source=Source(inputs=[str(tmp_path / f"a.{suffix}")]))
        )
        assert limited == items[:2]


def loaded(tmp_path, rows, entry=None, text=None):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text)
    entry = entry or Entry("bracketed_action")
    return load("tes", replace(entry, source=Source(inputs=[str(file)])))


rewards = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.1, 0.2, 0.3])), min_size=1, max_size=12)


@settings(max_examples=60)
@given(rewards, st.randoms(use_true_random=False), st.integers(0, 5))
def test_every_row_is_a_prompt_a_duplicate_or_over_the_limit_in_any_order(tmp_path_factory, given_rows, random, limit):
    rows = [{"prompt": prompt, "reward_action_0": reward, "reward_action_1": 1.0} for prompt, reward in given_rows]
    folder = tmp_path_factory.mktemp("rows")
    found = loaded(folder, rows)
    assert [(item.prompt, item.columns["rewards"][0]) for item in found.items] == list(dict.fromkeys(given_rows))
    assert len({item.uid for item in found.items}) == len(found.items)
    counts = found.counts()
    assert counts["rows"] == len(rows) == counts["prompts"] + counts.get("duplicate", 0)
    assert counts["shared"] == sum(len({r for p, r in given_rows if p == one}) > 1 for one in "abc")
    shuffled = random.sample(rows, len(rows))
    names = {item.uid: (item.prompt, item.columns) for item in found.items}
    assert {item.uid: (item.prompt, item.columns) for item in loaded(folder, shuffled).items} == names
    few = loaded(folder, rows, Entry("bracketed_action", limit=limit))
    assert few.sheet.kept == len(few.items) == min(limit or len(found.items), len(found.items))
    assert few.sheet.rows == few.sheet.kept + few.sheet.dropped.total()


def test_prompts_that_are_asked_once_have_the_names_that_they_had(tmp_path):
    """What was sampled before is gone on with: only rows that contradict one another have other names."""
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    items = loaded(tmp_path, rows, Entry(f"{HERE}:length")).items
    assert [item.uid for item in items][0] == f"tes/{Item.of('a').uid}" == "tes/167004e8304614a8"
    assert all(item.uid.startswith(f"tes/{Item.of('b').uid}/") for item in items[1:])


def test_records_without_prompts_blank_lines_and_wrong_rows_are_counted_and_told(tmp_path):
    texts = ["so <<48/2=24>> and <<1+1=3>>", "none", "<<1+1=2>><<1+1=2>><<x>>"]
    lines = [json.dumps({"question": "q", "answer": text}) for text in texts]
    found = loaded(tmp_path, (), Entry("calculator"), "\n\n".join(lines) + "\n")
    counts = {"lines": 5, "blank_line": 2, "no_prompt": 1, "rows": 5, "wrong_answer": 1, "duplicate": 1,
              "unparsable": 1, "prompts": 2, "shared": 0}  # fmt: skip
    assert found.counts() == counts
    told = "2 blank_line, 1 no_prompt, 1 wrong_answer, 1 duplicate, 1 unparsable"
    assert counts_table({"tes": counts})["rows"] == [["tes", 5, 5, 2, told, 0]]


def spelled(path, rows):
    """The rows in the form that the file's name says."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = (json.dumps(rows) if ".json" in path.suffixes else text).encode()
        data = b"\xef\xbb\xbf" + data if "bom" in path.name else data
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
        path.write_bytes(pack(data))
    return str(path)


NAMES = ["a.jsonl", "bom.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "bom.json", "a.json.gz", "a.parquet", "a.csv"]


def test_every_door_reads_every_kind_of_file(tmp_path):
    """A mix, evaluate, materialize (rows of a task, and chats), dolci_prepare, and reject_filter."""
    from data_tools.packs import materialize
    from data_tools.prepare import dolci, rejection, rejection_element
    from megatron_ext.entrypoints import evaluate

    rows = [{"question": "q", "answer": "so <<48/2=24>>24"}, {"question": "r", "answer": "x"}]
    write_char_tokenizer(tmp_path / "marks", ALPHABET)
    marks, chats = str(tmp_path / "marks"), str(write_tokenizer(tmp_path / "chats"))
    for name in NAMES:
        folder = tmp_path / name.replace(".", "_")
        (folder / "shard").mkdir(parents=True)
        file = spelled(folder / name, rows)
        source = Source(inputs=[file])
        prompts = [
            load_items("calculator", Entry("calculator", source=source)),
            evaluate.rows(evaluate.Config(task="calculator", source=source)).items,
        ]
        assert [[item.prompt for item in items] for items in prompts] == [["48/2="]] * 2, name
        assert build(materialize.Config(source, marks, task="calculator"), folder / "rows")[1]["kept"] == 1, name
        assert build(materialize.Config(source, chats), folder / "chats")[1]["kept"] == 2, name
        assert dolci.sample_shard(dolci.Config([file], chats, language=""), folder / "shard", 0, 1)["kept"] == 2, name
        with pytest.raises(UserMistake, match=r":\d+|row 1: neither a text under 'prompt'"):
            rejection_element.reject_filter(rejection.Config([file]), folder / "shard")


def test_wrong_records_are_named_by_file_and_line_and_no_prompts_are_a_mistake(tmp_path):
    file = tmp_path / "a.jsonl"
    for text, message in (
        ('{"prompt": "?"}\n{"quest": "?"}\n', f"{file}:2: no text or messages under 'prompt'"),
        ('{"prompt": "?"}\n[1]\n', f"{file}:2: not a JSON object but a list"),
        ("{\n", f"{file}:1: not JSON"),
        ("", "task a: has no prompts"),
    ):
        file.write_text(text)
        with pytest.raises(UserMistake) as caught:
            load_items("a", Entry(f"{HERE}:length", source=Source(inputs=[str(file)])))
        assert message in str(caught.value)
    with pytest.raises(UserMistake, match="source.inputs: .*/absent is neither a file nor a folder"):
        load_items("a", Entry(f"{HERE}:length", source=Source(inputs=[str(tmp_path / "absent")])))


def cache(root: Path, files: dict[str, str]) -> None:
    """A dataset in the hub's cache, as `hf download` leaves it."""
    folder = root / "datasets--some--set"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    for name, text in files.items():
        path = folder / "snapshots" / "abc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_datasets_of_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache(
        tmp_path, {"main/test-0.jsonl": '{"prompt": "t"}\n', "main/train-0.jsonl": '{"prompt": "a"}\n', "README.md": ""}
    )
    for hub, prompts in (("some/set", ["t", "a"]), ("some/set@main:main/train-*", ["a"])):
        assert [item.prompt for item in load_items("x", Entry(f"{HERE}:length", hub=hub))] == prompts
    with pytest.raises(UserMistake, match="no file matches; it has main/test-0.jsonl, main/train-0.jsonl"):
        load_items("x", Entry(f"{HERE}:length", hub="some/set:nope*"))
    with pytest.raises(UserMistake, match="dataset some/other is not in the hub cache; run `hf download some/other"):
        load_items("x", Entry(f"{HERE}:length", hub="some/other"))
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "mine"}\n')
    [own] = load_items("x", Entry(f"{HERE}:length", hub="some/other", source=Source([str(file)])))  # files go before it
    assert own.prompt == "mine"


def test_datasets_that_are_missing_are_told_at_once_with_their_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path, {"train.jsonl": '{"prompt": "a"}\n'})
    entries = {
        "aime": Entry(), "there": Entry("gsm8k", hub="some/set"), "files": Entry("gsm8k", source=Source(["x"])),
        "again": Entry("aime"), "old": Entry("gsm8k", hub="some/other@v1:a*"),
        "made": Entry("countdown", source=Source(synthetic_rows=1)),
    }  # fmt: skip
    told = missing(datasets(MixConfig(entries)))
    gone = ("Maxwell-Jia/AIME_2024", "some/other@v1:a*")
    assert [line.split(";")[0] for line in told] == [f"dataset {spec} is not in the hub cache" for spec in gone]
    assert "`hf download Maxwell-Jia/AIME_2024 --repo-type dataset`" in told[0]
    assert "`hf download some/other --repo-type dataset --revision v1`" in told[1]


CONFIG = MixConfig({
    "calculater": Entry(weight=-1),
    "b": Entry("calculator", source=Source(inputs=["x"]), hub="openai/gsm8k", rewards={"corect": 1.0}, limit=-1),
    "c": Entry(f"{HERE}:length", {"prompt": "q"}),
    "d": Entry("calculator", {"reverse_digits": 1}, hub="gsm8k", weight=float("nan")),
    "e": Entry("nowhere.at:all", source=Source(inputs=["x"])),
})  # fmt: skip
TASKS = ", ".join(task_names())
OWN, CWD = "; one of your own is my.module, or my.module:function", Path.cwd()
TOLD = f"""
mix.entries.calculater.weight: -1 is out of range: at least 0
mix.entries.calculater.task: unknown task 'calculater' (did you mean calculator? known: {TASKS}){OWN}
mix.entries.b.limit: -1 is out of range: at least 0 (prompts)
mix.entries.b.rewards: task calculator has no reward term 'corect' (did you mean correct? known: correct)
mix.entries.c.options: unknown task option 'prompt' (did you mean prompt_key? known: answer_key, form, prompt_key)
mix.entries.c.source: no prompts; give files in source.inputs, or a dataset of the hub in hub
mix.entries.d.weight: nan is out of range: at least 0
mix.entries.d.options: task option reverse_digits=1 is a int, not bool
mix.entries.d.hub: 'gsm8k' is no dataset: write org/name, org/name@revision or org/name:glob
mix.entries.e.task: there is no module 'nowhere.at'; looked in {CWD}; it has to be importable where the run is submitted
""".strip().splitlines()


@pytest.mark.parametrize("text, name, told", [
    ("def items(): pass", "own", "is no task, which has Options, REWARDS, items and rewards"),
    ("def reward(item, said): pass", "own:rewards", "has no function 'rewards' (did you mean reward?"),
    ("from math import exp as reward", "own:reward", None), ("if True:\n    reward = len", "own:reward", None),
    ("class Options: pass\ndef items(): pass\nrewards = items", "own", None), ("1 +", "own:reward", None),
])  # fmt: skip
def test_a_module_of_ones_own_is_told_to_be_no_task_before_it_runs(tmp_path, monkeypatch, text, name, told):
    folder = tmp_path / "own_tasks"
    folder.mkdir()
    (folder / "own.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)
    found = check_task(f"own_tasks.{name}")
    assert found is None if told is None else told in found


ENVIRONMENTS = """
- agent_type: DAPOAgent
  agent_args: {format_reward: 0.25}
  weight: 1.0
- agent_type: examples.rl.environments.math.aime_agent.AIMEAgent
  agent_args: {format_reward: 0.0}
  weight: 0.0
  evaluation_only: true
"""


def test_megatrons_environments_are_entries_and_settings_go_over_them(tmp_path):
    file = tmp_path / "dapo.yaml"
    file.write_text(ENVIRONMENTS)
    config = MixConfig({"aime": Entry(limit=4)}, str(file))
    entries = entries_of(config)
    assert entries == {
        "dapo_math": Entry("dapo_math", {"answer_format": "tagged"}, rewards={"format": 0.25}),
        "aime": Entry(
            "aime", {"answer_format": "tagged"}, weight=0.0, rewards={"format": 0.0}, evaluation_only=True, limit=4
        ),
    }
    assert not check_mix(config)


@pytest.mark.parametrize("text, message", [
    ("- {agent_type: DAPOAgnt}", "environment 1: agent DAPOAgnt has no task here (did you mean DAPOAgent?"),
    (
        "- {agent_type: DAPOAgent, agent_args: {negative_reward: -1.0}}",
        "agent_args.negative_reward: -1.0 has no counterpart",
    ),
    ("- {agent_type: DAPOAgent, wieght: 2}", "unknown key 'wieght' (did you mean weight?"),
    ("- {agent_type: DAPOAgent}\n- {agent_type: DAPOAgent}", "environment 2: DAPOAgent stands twice"),
    ("a: 1", "no list of environments"), ("- [", "not YAML"), ("- {weight: 1}", "has no agent_type"),
])  # fmt: skip
def test_environments_without_a_counterpart_are_refused(tmp_path, text, message):
    file = tmp_path / "env.yaml"
    file.write_text(text)
    told = [str(problem) for problem in check_mix(MixConfig(environments=str(file)))]
    assert len(told) == 1 and message in told[0] and told[0].startswith("mix.environments: ")


def test_everything_wrong_is_told_at_once():
    assert [str(problem) for problem in check_mix(CONFIG)] == TOLD
    assert "no tasks" in str(check_mix(MixConfig())[0])
    only = MixConfig({"calculator": Entry(source=Source(synthetic_rows=1), evaluation_only=True)})
    assert "nothing is trained on" in str(check_mix(only)[0]) and not check_mix(only, training=False)


def test_checks_import_neither_torch_nor_the_users_module():
    program = f"""
import sys
from data_tools.tasks.mix import Entry, MixConfig, check_mix
from data_tools.tasks.task import Source
assert not check_mix(MixConfig({{"a": Entry("{HERE}:length", source=Source(inputs=["x"]))}}))
assert not {{"torch", "numba", "{HERE}"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])


def test_texts_after_which_a_task_is_asked_are_known_or_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "users_tools").mkdir()

    def of(body: str) -> dict:
        name = f"tool_{len(list(tmp_path.rglob('*.py')))}"
        (tmp_path / "users_tools" / f"{name}.py").write_text(f"from data_tools.tasks.gsm8k import *\n{body}\n")
        return turn_ends({"tool": Entry(f"users_tools.{name}")})

    calculating = {"math": Entry("gsm8k", {"calculator": True}), "plain": Entry("gsm8k"), "aime": Entry("aime")}
    assert turn_ends(calculating) == {"math": ("=",)}
    assert of("stop_strings = lambda options: ['</call>']") == {"tool": ("</call>",)}
    for body, message in (("del stop_strings", "AttributeError"),
                          ("stop_strings = lambda options: 1 / 0", "ZeroDivisionError"),
                          ("stop_strings = lambda options: '='", "give a list of texts, or None")):  # fmt: skip
        with pytest.raises(UserMistake, match=message):
            of(body)


@pytest.mark.parametrize(
    "body, said",
    [
        ('yield Item.of("a", 1)', "`items` gives generator"),
        ('return {"prompt": "a"}', "`items` gives dict"),
        ('return [{"prompt": "a"}]', "`items` gives a list with dict"),
    ],
)
def test_a_task_whose_items_are_none_is_named_with_what_is_needed(body, said, tmp_path, monkeypatch):
    name = f"own_{len(body)}"
    lines = ["from dataclasses import dataclass", "from data_tools.tasks.task import Item", "HUB = ''"]
    lines += ["REWARDS = {'right': 1.0}", "@dataclass", "class Options:", "    loud: bool = False"]
    lines += ["def rewards(item, completion, options):", "    return {'right': 1.0}"]
    lines += ["def items(record, options):", f"    {body}", ""]
    (tmp_path / name).mkdir()
    (tmp_path / name / "capitals.py").write_text("\n".join(lines))
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    entry = Entry(task=f"{name}.capitals", source=Source(inputs=[str(tmp_path / "rows.jsonl")]))
    with pytest.raises(UserMistake) as found:
        load("own", entry)
    assert said in str(found.value) and "capitals.py" in str(found.value) and "task.Item" in str(found.value)
