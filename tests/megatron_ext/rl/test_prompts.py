"""Prompts that leave no room for a completion are refused before the first step, all at once."""

import pytest

from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.tasks.mix import Entry, Mix
from data_tools.tasks.task import Item
from megatron_ext.rl.prompts import Encoding, MixPrompts


def test_every_prompt_without_room_is_named_before_one_is_drawn(calculator):
    texts = {"short": "1+1=", "full": "1" * 20, "long": "1" * 21, "longest": "12" * 40, "none": ""}
    entries = {"sums": Entry("calculator"), "held": Entry("calculator", evaluation_only=True)}
    items = {name: [Item(f"{name}/{uid}", text) for uid, text in texts.items()] for name in entries}
    encoder = PromptEncoder(load_tokenizer(str(calculator["hf"])), {})
    prompts = MixPrompts(Mix(entries, 0, items), Encoding(encoder, 20))
    with pytest.raises(UserMistake) as raised:
        prompts.check()
    refused = [str(problem) for problem in raised.value.problems]
    assert [problem.split()[2] for problem in refused] == ["sums/long", "sums/longest", "sums/none"], refused
    assert "has 21 tokens" in refused[0] and "leave 20 for it" in refused[0]
    assert "prompt sums/none is empty, and nothing can follow nothing" in refused[2]
