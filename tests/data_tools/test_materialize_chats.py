"""Conversations through materialize: the same store however it is split, and nothing lost on bad input."""

import gzip
import itertools
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.base import declared
from data_tools.base.durable import read_json
from data_tools.chats.chat import ChatConfig, ChatRows
from data_tools.chats.encoder import Encoder
from data_tools.chats.messages import IN_LOSS
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake, disk_problem
from data_tools.packs.materialize import Config, check, materialize
from data_tools.packs.store import Store
from data_tools.records.balance import Balance
from data_tools.tasks.task import Source
from jobs.kind import Placement
from jobs.phases import materialize as materialize_phase
from jobs.task import Task
from tests.data_tools.chats import (
    ASKED,
    CONVERSATIONS,
    FOUND,
    GREEDY,
    SOLVED,
    TEMPLATES,
    TOOLS,
    message,
    template_of,
    tokenizer_of,
    write_tokenizer,
)
from tests.data_tools.conftest import build
from tests.data_tools.test_materialize import contents
from tests.inputs import QUICK_ON_SHIPPED

FAMILIES = ["qwen2_5", "qwen3", "gptoss", "nemotron_3_nano", "deepseekv3", "glm4moe", "llama3"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=template_of("qwen3"))


def config_of(tokenizer: Path, *inputs: Path, **changes) -> Config:
    return Config(tokenizer=str(tokenizer), source=Source(inputs=list(map(str, inputs))), **changes)


def lines_of(*conversations, **more) -> bytes:
    return b"".join(json.dumps({"messages": messages, **more}).encode() + b"\n" for messages in conversations)


a_line = st.one_of(
    st.sampled_from(list(CONVERSATIONS.values())).map(lambda messages: lines_of(messages, tools=TOOLS)),
    st.sampled_from(
        [
            b"\n",
            b"{\n",
            b"\xff\n",
            b"[]\n",
            b'{"messages": []}\n',
            lines_of([ASKED]),
            lines_of([ASKED, message("assistant", "")]),
        ]
    ),
)


@settings(max_examples=8)  # each writes durable files, a dozen an element
@given(
    st.lists(st.lists(a_line, max_size=12), min_size=1, max_size=3), st.integers(2, 5), st.integers(1, 5), st.booleans()
)
def test_the_store_does_not_depend_on_elements_or_chunks(
    tmp_path_factory, tokenizer, files, count, chunk_size, pack
) -> None:
    folder = tmp_path_factory.mktemp("m")
    inputs = []
    for place, lines in enumerate(files):
        inputs.append(folder / f"{place}.jsonl")
        inputs[-1].write_bytes(gzip.compress(b"".join(lines)) if pack else b"".join(lines))
    config = config_of(tokenizer, *inputs, on_bad_row="bucket", max_tokens=400)
    try:
        one, facts = build(config, folder)
    except UserMistake as mistake:
        assert "no row is left" in str(mistake)
        return
    config.chunk_size = chunk_size
    many, facts_of_many = build(config, folder, count)
    assert contents(many) == contents(one) and facts_of_many == facts
    sheet = Balance.from_json(read_json(one / "balance.json"))
    sheet.check()
    assert sum(source.lines for source in sheet.sources) == sum(map(len, files))


def test_64_elements_give_the_store_of_one(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of(*CONVERSATIONS.values(), tools=TOOLS) * 4)
    config = config_of(tokenizer, tmp_path / "a.jsonl", dedupe=False)
    assert contents(build(config, tmp_path, 64)[0]) == contents(build(config, tmp_path, 1)[0])


def test_workers_do_not_change_the_store_and_name_bad_lines_alike(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of(*CONVERSATIONS.values(), tools=TOOLS) * 5)
    config = config_of(tokenizer, tmp_path / "a.jsonl", dedupe=False)
    one, _ = build(config, tmp_path / "one")
    config.workers, config.chunk_size = 2, 3
    two, _ = build(config, tmp_path / "two", 2)
    assert contents(one) == contents(two)
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() + b"{\n")
    with pytest.raises(UserMistake, match=r"a.jsonl:31: not JSON"):
        materialize(config, _folder(tmp_path / "bad"), 0, 1)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_provenance_says_where_each_row_came_from_and_how_many_turns_it_trains(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(
            b"\n" + lines_of(CONVERSATIONS["two turns"], [ASKED, message("assistant", name)])
        )
    store = Store(build(config_of(tokenizer, tmp_path / "a.jsonl", tmp_path / "b.jsonl"), tmp_path, 3)[0])
    assert list(zip(store.sources.tolist(), store.lines.tolist(), store.turns.tolist())) == [
        (0, 2, 2),
        (0, 3, 1),
        (1, 3, 1),
    ]
    hashes = [tuple(words) for words in store.prompt_hashes.tolist()]
    assert hashes[1] == hashes[2] != hashes[0]  # one question


def _longest(tokenizer: Path) -> int:
    """Tokens of the longest conversation."""
    chats = ChatRows(ChatConfig(), load_tokenizer(str(tokenizer)), Encoder(load_tokenizer(str(tokenizer))))
    return max(
        len(row.ids)
        for messages in CONVERSATIONS.values()
        for row in chats.rows({"messages": messages, "tools": TOOLS})
    )


def test_tokens_add_up_per_source(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of(*CONVERSATIONS.values(), tools=TOOLS) * 2)
    out, facts = build(config_of(tokenizer, tmp_path / "a.jsonl", max_tokens=_longest(tokenizer) - 1), tmp_path, 2)
    (sheet,) = Balance.from_json(read_json(out / "balance.json")).sources
    assert sheet.tokens_dropped["too_long"] > 0 and sheet.tokens_dropped["duplicate"] > 0
    assert sheet.tokens_in == sheet.tokens + sheet.tokens_dropped.total() and sheet.tokens == Store(out).tokens
    assert facts["table"]["columns"][-4:] == ["tokens in", "tokens", "supervised", "masked"]


def _trained(tokenizer, store, row):
    ids, mask = store.ids(row), store.mask(row)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    return [load_tokenizer(str(tokenizer)).decode(ids[start:stop].tolist()) for start, stop in edges]


def test_rows_are_equal_only_if_they_train_the_same(tmp_path, tokenizer):
    """Whatever order they come in; and one that trains nothing is no copy of any: it is dropped as such."""
    chats = [
        [ASKED, {**SOLVED, "weight": first}, message("user", "Sure?"), message("assistant", "Yes.", weight=second)]
        for first, second in itertools.product((0, 1), (0, 1))
    ]
    for number, order in enumerate(itertools.permutations(range(4))):
        (tmp_path / f"{number}.jsonl").write_bytes(lines_of(*(chats[place] for place in (*order, *reversed(order)))))
    config = config_of(tokenizer, *(tmp_path / f"{number}.jsonl" for number in (0, 9, 17, 23)))
    for count in (1, 3):
        out, facts = build(config, tmp_path, count)
        store = Store(out)
        assert facts["buckets"] == {"duplicate": 21, "nothing_trained": 8} and len(store) == 3
        assert len(np.unique(store.row_hashes, axis=0)) == 1
        assert sorted(len(_trained(tokenizer, store, row)) for row in range(3)) == [1, 1, 2]


FORMS = {
    "messages": lambda turns: {"messages": turns},
    "traj": lambda turns: {"traj": turns},
    "sharegpt": lambda turns: {"conversations": [
        {{"role": "from", "content": "value"}.get(key, key): value for key, value in turn.items()} for turn in turns]},
    "prompt_completion": lambda turns: {"prompt": turns[:1], "completion": turns[1:]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_tokens_of_a_turn_that_the_data_keeps_out_are_not_in_the_loss(tmp_path, tokenizer, form):
    """By every key that says so, in every form."""
    rows = [FORMS[form]([message("user", f"q {key}"), message("assistant", f"BAD {key}", **{key: value}),
                         message("user", "more?"), message("assistant", f"good {key}", **{key: 1})])
            for key in IN_LOSS for value in (False, 0)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(build(config_of(tokenizer, tmp_path / "a.jsonl", dedupe=False), tmp_path)[0])
    assert len(store) == len(rows)
    for row, key in zip(range(len(store)), (key for key in IN_LOSS for _ in range(2))):
        (learnt,) = _trained(tokenizer, store, row)
        assert f"good {key}" in learnt and "BAD" not in learnt


# -- bad input --------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "invalid UTF-8": (b'{"messages": "\xff"}', "malformed_line", "not UTF-8: invalid start byte"),
    "not JSON": (b'{"messages": [', "malformed_line", "not JSON"),
    "of the wrong type": (b"[]", "malformed_record", "not a JSON object but a list"),
    "deep": (b"[" * 100_000, "malformed_line", "levels of JSON"),
    "no known schema": (b'{"prompt": "x"}', "malformed_record", "no known schema has the keys prompt"),
    "empty assistant turn": (
        lines_of([ASKED, message("assistant", "")]).strip(),
        "empty_assistant",
        "message 2: the assistant says nothing",
    ),
    "no assistant": (lines_of([ASKED]).strip(), "no_assistant", "none of an assistant"),
    "half a surrogate pair": (lines_of([message("user", "\ud800"), SOLVED]).strip(), "not_unicode", "not Unicode"),
    "a template that raises": (
        lines_of([ASKED, message("tool", "4"), SOLVED]).strip(),
        "template_error",
        "the chat template refuses it",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_or_counted_as_asked(tmp_path, tokenizer, kind):
    line, bucket, reason = BAD_LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([ASKED, SOLVED]) + b"\n" + line + b"\n")
    config = config_of(tokenizer, path, chat=ChatConfig(template=str(TEMPLATES / "gptoss.jinja")))
    told = []
    for index in range(3):
        try:
            materialize(config, _folder(tmp_path / f"p{index}"), index, 3)
        except UserMistake as mistake:
            told.append(str(mistake))
            with pytest.raises(UserMistake, match="is no token store"):  # nothing half-written passes for one
                Store(tmp_path / f"p{index}")
    assert len(told) == 1 and told[0].startswith(f"{path}:3: ") and reason in told[0] and "\n" not in told[0]
    config.on_bad_row = "bucket"
    _, facts = build(config, tmp_path, 2)
    assert facts["buckets"] == {"blank_line": 1, bucket: 1} and facts["kept"] == 1


def test_a_line_of_1_mb_is_one_row(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of([ASKED, message("assistant", "word " * 200_000)], [ASKED, SOLVED]))
    out, facts = build(config_of(tokenizer, tmp_path / "a.jsonl"), tmp_path, 4)
    assert facts["kept"] == 2 and Store(out).lengths[0] > 200_000
    _, facts = build(config_of(tokenizer, tmp_path / "a.jsonl", max_tokens=1000), tmp_path / "limited", 4)
    assert facts["buckets"] == {"too_long": 1}


@pytest.mark.parametrize("on_bad_row", ["fail", "bucket"])
def test_a_truncated_gzip_fails_whatever_bad_rows_do_since_nobody_knows_what_is_missing(
    tmp_path, tokenizer, on_bad_row
):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines_of(*CONVERSATIONS.values(), tools=TOOLS) * 50)[:-500])
    with pytest.raises(UserMistake, match=f"{path} is cut off"):
        materialize(config_of(tokenizer, path, on_bad_row=on_bad_row), _folder(tmp_path / "p"), 0, 1)
    assert not (tmp_path / "p" / "store.json").exists()


@pytest.mark.parametrize(("changes", "reason"), [
    ({"eos_token": None}, "has no eos token"),
    ({"template": "{% for m in messages %}"}, "chat template, line 1"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_end_a_turn_is_refused(tmp_path, changes, reason):
    tokenizer = write_tokenizer(tmp_path / "t", **changes)
    (tmp_path / "a.jsonl").write_bytes(lines_of([ASKED, SOLVED]))
    with pytest.raises(UserMistake, match=reason):
        materialize(config_of(tokenizer, tmp_path / "a.jsonl"), _folder(tmp_path / "p"), 0, 1)


def test_padding_with_the_end_token_changes_no_row_and_no_mask(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of(*CONVERSATIONS.values(), tools=TOOLS))
    stores = []
    for name in ("<|endoftext|>", "<|im_end|>"):
        folder = tmp_path / name
        padded = write_tokenizer(folder / "t", template=template_of("qwen3"), pad_token=name)
        stores.append(contents(build(config_of(padded, tmp_path / "a.jsonl", on_bad_row="bucket"), folder)[0]))
    assert stores[0] == stores[1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_answer_that_holds_the_padding_token_is_counted_whatever_the_number_of_elements(tmp_path, tokenizer, count):
    said = [message("assistant", text) for text in ("One.", "The end: <|endoftext|>.", "Three.")]
    (tmp_path / "a.jsonl").write_bytes(lines_of(*([ASKED, one] for one in said)))
    _, facts = build(config_of(tokenizer, tmp_path / "a.jsonl", on_bad_row="bucket"), tmp_path, count)
    assert facts["buckets"] == {"padding_token": 1}


def test_folders_and_patterns_give_the_store_of_their_files_and_each_file_counts_once(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    for name, conversation in zip("abcdef", CONVERSATIONS.values()):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines_of(conversation, tools=TOOLS))
    files = sorted((tmp_path / "data").iterdir())
    stores = [
        contents(build(config_of(tokenizer, *inputs, on_bad_row="bucket"), tmp_path / str(number))[0])
        for number, inputs in enumerate([files, [tmp_path / "data"], [tmp_path / "data" / "*.jsonl"]])
    ]
    assert stores[0] == stores[1] == stores[2]
    with pytest.raises(UserMistake, match="source.inputs: .*a.jsonl is given twice"):
        build(config_of(tokenizer, files[0], tmp_path / "*" / "a.jsonl"), tmp_path / "twice")


def test_a_wrong_mask_fails_whatever_bad_rows_do(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(GREEDY)
    (tmp_path / "a.jsonl").write_bytes(lines_of([ASKED, SOLVED, FOUND, SOLVED]))
    config = config_of(
        tokenizer, tmp_path / "a.jsonl", chat=ChatConfig(template=str(tmp_path / "t.jinja")), on_bad_row="bucket"
    )
    with pytest.raises(UserMistake, match="a.jsonl:1: the loss mask is wrong: message 3, of role tool, is in the loss"):
        materialize(config, _folder(tmp_path / "p"), 0, 1)


def test_settings_that_only_tasks_have_are_refused(tokenizer):
    config = Config(
        tokenizer=str(tokenizer),
        source=Source(synthetic_rows=3),
        task_options={"x": 1},
        format="tsv",
        chat=ChatConfig(turns="first"),
        encoder="fast",
        workers=0,
    )
    where = [problem.where for problem in declared.check_with(config, check)]
    assert where == ["chat.turns", "format", "encoder", "workers", "source.synthetic_rows", "task_options"]


def test_a_full_disk_leaves_no_store_and_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of([ASKED, message("assistant", "x" * 1_000_000)]))
    disk = _folder(tmp_path / "disk")
    if subprocess.run(["mount", "-o", "size=1m", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs; like the shared data, not everywhere")
    try:
        with pytest.raises(OSError) as caught:
            materialize(config_of(tokenizer, tmp_path / "a.jsonl"), _folder(disk / "p"), 0, 1)
        assert "no space is left" in disk_problem(caught.value, disk) and not (disk / "p" / "store.json").exists()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    build(config_of(tokenizer, tmp_path / "a.jsonl"), tmp_path)


def test_what_a_template_leaves_out_is_said_in_the_headline_with_what_keeps_it(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t", template=template_of("qwen2_5"))
    (tmp_path / "a.jsonl").write_bytes(lines_of([ASKED, SOLVED], CONVERSATIONS["thinking"]))

    def facts_of(**options):
        out = _folder(tmp_path / f"p{len(list(tmp_path.iterdir()))}")
        config = config_of(tokenizer, tmp_path / "a.jsonl", on_bad_row="bucket", chat=ChatConfig(**options))
        task = Task("data", 0, 1, None, _folder(out / "part"), _folder(out / "keep"), 0, 1)
        materialize_phase.run(config, task)
        return materialize_phase.finish([out / "part"], config, replace(task, out=_folder(out / "all")))

    facts = facts_of()
    assert facts["buckets"] == {"reasoning_lost": 1} and "chat.inline_reasoning: true" in facts["headline"]
    facts = facts_of(inline_reasoning=True)
    assert facts["kept"] == 2 and facts["inline_reasoning"] and "between <think> tags" in facts["headline"]
    facts = facts_of(may_lose=["reasoning"])
    assert facts["kept"] == 2 and facts["may_lose"] == ["reasoning"] and "reasoning left out" in facts["headline"]
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"{torn\n")
    facts = facts_of(may_lose=["reasoning"])  # a line that cannot be read counts as a row that came
    assert facts["headline"].startswith("2 of 3 rows kept (1 malformed_line; left_out.jsonl lists 1), ")


# -- the real files ---------------------------------------------------------------------------------------------------

FILES = ["tau_bench/gpt-4o-airline.json", "llamafactory/glaive_toolcall_en_demo.json",
         "llamafactory/glaive_toolcall_zh_demo.json", "llamafactory/reason_tool_use_demo_50.jsonl",
         "llamafactory/v1_sft_demo.jsonl", "gsm8k/test.jsonl"]  # fmt: skip


QUICK = [("qwen3", "gpt2_rebuilt")]
TRIALS = [
    pytest.param(*trial, marks=[] if trial in QUICK else pytest.mark.soak)
    for trial in itertools.product(FAMILIES, ["qwen3_rebuilt", "gpt2_rebuilt"])
]


@QUICK_ON_SHIPPED
@pytest.mark.parametrize(("name", "tokenizer_name"), TRIALS)
def test_the_rows_of_the_shared_files_add_up(tmp_path, inputs, name, tokenizer_name):
    tokenizer = tokenizer_of(inputs, tmp_path / "tokenizer", tokenizer_name)
    files, lines = list(map(inputs.data, FILES)), list(map(inputs.lines, FILES))
    arguments = {"bos_token": ""} if name == "llama3" else {}
    chat = ChatConfig(template=str(TEMPLATES / f"{name}.jinja"), arguments=arguments)
    config = config_of(tokenizer, *files, chat=chat, on_bad_row="bucket", dedupe=False)
    out, facts = build(config, tmp_path, 3)
    sheets = Balance.from_json(read_json(out / "balance.json")).sources
    assert [sheet.lines for sheet in sheets] == lines
    assert facts["kept"] == len(Store(out)) and facts["kept"] + sum(facts["buckets"].values()) == sum(lines)
    if name in ("qwen3", "nemotron_3_nano", "glm4moe"):
        assert not facts["buckets"]
    if name == "qwen2_5":  # whose template knows no reasoning
        assert facts["buckets"] == {"reasoning_lost": inputs.lines("llamafactory/reason_tool_use_demo_50.jsonl")}


def test_conversations_for_a_tokenizer_without_a_chat_template_are_refused_before_they_queue(tmp_path):
    """Whether its folder is there, or a phase upstream will make it; what nobody knows yet is not asked."""
    plain, own = write_tokenizer(tmp_path / "plain", template=None), tmp_path / "own.jinja"
    own.write_text(template_of("qwen3"))

    def wheres(tokenizer: str, forecast: bool | None = None, **changes) -> list[str]:
        config = replace(Config(Source(["x.jsonl"]), tokenizer), **changes)
        placement = Placement(1, forecasts={"upstream": {"chat_template": forecast}})
        return [p.where for p in materialize_phase.check(config, placement) if "no chat template" in p.message]

    assert wheres(str(plain)) == ["tokenizer"] == wheres(str(plain), task="openthoughts")
    assert wheres("upstream", False) == wheres("upstream/hf", False) == ["tokenizer"]
    assert not [
        *wheres("upstream", True),
        *wheres("upstream"),
        *wheres("org/name", False),
        *wheres("nowhere/hf", False),
    ]
    with_template = write_tokenizer(tmp_path / "templated", template=template_of("qwen3"))
    assert not [*wheres(str(with_template)), *wheres(str(plain), chat=ChatConfig(template=str(own)))]
    assert not [*wheres(str(plain), chat=ChatConfig(schema="rendered")), *wheres(str(plain), task="calculator")]
