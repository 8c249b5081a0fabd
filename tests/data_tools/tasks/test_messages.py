"""A prompt that is a text and one in messages are told apart by plan: what a template passes by is said."""

import gzip
import importlib
import json
from dataclasses import replace

import pytest

from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.tasks.messages import check_template, past_template, told_texts
from data_tools.tasks.mix import Entry, Mix, MixConfig, load_items
from data_tools.tasks.task import Source, check_options
from jobs.kind import Placement
from tests.data_tools.chats import write_tokenizer

TEXT, CHAT = {"prompt": "2+2="}, {"messages": [{"role": "user", "content": "2+2="}]}


def mix_of(folder, *records, hub="", name="rows.jsonl", **options):
    path = folder / name
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    source = Source() if hub else Source(inputs=[str(path)])
    return MixConfig(entries={"mine": Entry(task="my.module:reward", source=source, hub=hub, options=options)})


@pytest.mark.parametrize("kind", ["grpo", "generate", "evaluate"])
def test_plan_says_that_texts_pass_a_models_template_by(kind, tmp_path):
    phase = importlib.import_module(f"jobs.phases.{kind}")
    config = phase.Config(model="model", mix=mix_of(tmp_path, TEXT))
    for known, said in ((True, 1), (False, 0), (None, 0)):
        remarks = phase.remarks(config, Placement(1, forecasts={"model": {"chat_template": known}}))
        assert len(remarks) == said
    (remark,) = phase.remarks(config, Placement(1, forecasts={"model": {"chat_template": True}}))
    for part in ("mix.entries.mine", "model's tokenizer", "{form: message}", "give messages", "{form: text}"):
        assert part in remark


@pytest.mark.parametrize("record, options, said", [
    (TEXT, {}, 1), (TEXT, {"form": "text"}, 0), (TEXT, {"form": "message"}, 0), (CHAT, {}, 0),
    ({"asked": "2+2="}, {"prompt_key": "asked"}, 1), ({"prompt": "<|im_start|>user\n2+2=<|im_end|>"}, {}, 0),
    ({"prompt": "1 < 2 and |x| > 1"}, {}, 1), ({"prompt": 5}, {}, 0), ([TEXT], {}, 0), (TEXT, {"form": "chat"}, 0),
])  # fmt: skip
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_what_says_how_it_asks_is_not_told(name, record, options, said, tmp_path):
    assert len(told_texts(mix_of(tmp_path, record, name=name, **options), True, "m")) == said


def test_what_cannot_be_read_yet_is_not_told(tmp_path):
    assert not told_texts(mix_of(tmp_path, name="later.jsonl"), True, "m")
    assert not told_texts(mix_of(tmp_path, hub="nobody/nothing"), True, "m")
    assert not told_texts(mix_of(tmp_path, TEXT, no_option=1), True, "m")


def test_a_text_becomes_a_users_message_where_the_options_say_so(tmp_path, monkeypatch):
    (tmp_path / "scored_here.py").write_text("def reward(item, completion):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = PromptEncoder(load_tokenizer(str(write_tokenizer(tmp_path / "tokenizer"))))
    asked = {}
    for form in ("", "text", "message"):
        (entry,) = mix_of(tmp_path, TEXT, form=form).entries.values()
        (item,) = load_items("mine", Entry(**{**vars(entry), "task": "scored_here:reward"}))
        asked[form] = encoder.text(item.prompt)
    (entry,) = mix_of(tmp_path, CHAT).entries.values()
    (item,) = load_items("mine", Entry(**{**vars(entry), "task": "scored_here:reward"}))
    assert asked[""] == asked["text"] == "2+2=" and asked["message"] == encoder.text(item.prompt) != "2+2="


OWN = """
from dataclasses import dataclass
from data_tools.tasks.task import Item
@dataclass
class Options:
    pass
def items(record, options):
    return [Item.of(record["asked"])]
def rewards(item, completion, options):
    return 1.0
"""


@pytest.mark.parametrize("asked, said", [("2+2=", 1), (CHAT["messages"], 0), ("<|im_start|>user\n2+2=", 0)])
def test_the_run_says_that_texts_of_a_users_own_module_pass_the_template_by(asked, said, tmp_path, monkeypatch):
    """Which plan, that runs no module of theirs, cannot."""
    (tmp_path / "asking_here").mkdir()
    (tmp_path / "asking_here" / "sums.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "tokenizer")))
    (entry,) = mix_of(tmp_path, {"asked": asked}).entries.values()
    mix = Mix({"mine": Entry(**{**vars(entry), "task": "asking_here.sums"})}, seed=1)
    told = past_template(mix.entries, mix.items, tokenizer)
    assert len(told) == said and all("1 of its 1 prompts are texts" in line for line in told)
    assert not past_template(mix.entries, mix.items, replace(tokenizer, chat_template=None))


def test_messages_of_texts_need_a_template(tmp_path):
    (problem,) = check_template(mix_of(tmp_path, TEXT, form="message"), False, "m")
    assert "has no chat template" in str(problem) and "form: text" in str(problem)


def test_another_form_is_refused():
    from data_tools.tasks.task import FunctionTask

    (problem,) = check_options(FunctionTask, {"form": "chat"})
    assert "form" in str(problem) and "message" in str(problem)
