"""Stock chat templates: ids are transformers', masks those of an oracle by growing prefixes, refusals are true."""

import os
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from data_tools.chat import ChatConfig, ChatRows, Encoded
from data_tools.encoder import Encoder
from data_tools.mistake import UserMistake
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.chats import TEMPLATES, message
from tests.data_tools.oracle import Prefixes, stops_of, tokenizer_for

STOCK = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
MORE = sorted(Path(os.environ.get("AFTEROK_TEMPLATES", "/nowhere")).glob("*.jinja"))  # llama.cpp's models/templates

TOOLS = [{"type": "function", "function": {"name": "addnumbers", "description": "Adds two numbers.", "parameters": {
    "type": "object", "properties": {"first": {"type": "integer", "description": "One."},
                                     "text": {"type": "string", "description": "Other."}}, "required": ["first"]}}}]


def call(identity, **arguments):
    return {"type": "function", "id": identity, "function": {"name": "addnumbers", "arguments": arguments}}


def thought(text):
    return {"reasoning_content": text, "thinking": text}


ADDING = message("assistant", "", tool_calls=[call("call00001", first=12, text="ARGUMENTONE")])
FOUND = message("tool", "RESULTONE", name="addnumbers", tool_call_id="call00001")
CHATS = {
    "plain": ([message("user", "QUESTIONONE?"), message("assistant", "ANSWERONE."), message("user", "QUESTIONTWO, x?"),
               message("assistant", "ANSWERTWO\n\nis *this*.")], None),
    "tools": ([message("user", "QUESTIONONE?"), ADDING, FOUND, message("assistant", "ANSWERONE."),
               message("user", "QUESTIONTWO?"), message("assistant", "ANSWERTWO.")], TOOLS),
    "reasoning": ([message("user", "QUESTIONONE?"), message("assistant", "ANSWERONE.", **thought("THOUGHTONE\nis.")),
                   message("user", "QUESTIONTWO?"),
                   message("assistant", "ANSWERTWO.", **thought("THOUGHTTWO."))], None),
    "both": ([message("user", "QUESTIONONE?"), {**ADDING, **thought("THOUGHTONE.")}, FOUND,
              message("assistant", "ANSWERONE.", **thought("THOUGHTTWO."))], TOOLS),
}  # fmt: skip

# In which form a template reads messages, where it is not the plain one.
TEXT_ARGUMENTS = ("deepseekv3", "meetkai-functionary-medium-v3.2")
PARTS = ("idefics3", "smolvlm", "llava_next")
REASONING = ("upstage",)


def as_read(name, messages):
    """The messages in the form that a template reads."""
    messages = [dict(one) for one in messages]
    for one in messages:
        if name in TEXT_ARGUMENTS and one.get("tool_calls"):
            one["tool_calls"] = [{**given, "function": {
                **given["function"], "arguments": json_of(given["function"]["arguments"])}}
                for given in one["tool_calls"]]
        if name.startswith(PARTS):
            one["content"] = [{"type": "text", "text": one["content"]}]
        if name.startswith(REASONING) and "thinking" in one:
            one["reasoning"] = one["thinking"]
    return messages


def json_of(arguments):
    import json

    return json.dumps(arguments, ensure_ascii=False)


class Trial:
    """A template with a tokenizer that has its special tokens, ours and transformers'."""

    def __init__(self, path, folder):
        self.name, self.path = path.stem, path
        self.theirs = tokenizer_for(self.name, path.read_text(), CHATS.values())
        self.theirs.save_pretrained(folder)
        self.ours = load_tokenizer(str(folder))

    def outcome(self, messages, tools, turns):
        """"equal", or why it was refused; asserts that either is true."""
        config = ChatConfig(turns=turns, template=str(self.path), date=date.today().isoformat())
        try:
            rows = list(ChatRows(config, self.ours, Encoder(self.ours, "huggingface")).rows(
                {"messages": messages, "tools": tools}))
        except UserMistake as mistake:
            return f"refused: {mistake}"
        users = [number for number, one in enumerate(messages) if one["role"] == "user"]
        ends = [*users[1:], len(messages)] if turns == "each" else [len(messages)]
        for row, end in zip(rows, ends, strict=True):
            read = as_read(self.name, messages[:end])
            if not isinstance(row, Encoded):
                self.check_refusal(row, read, tools)
                return f"refused: {row.reason}"
            first = max(user for user in users if user < end) if turns == "each" else 0
            self.check(row, Prefixes(self.theirs, read, tools, stops_of(self.name)), first, turns)
        return "equal"

    def check(self, row, prefixes, first, turns):
        """The mask is the oracle's, wherever that knows it."""
        ids, mask = row.ids.tolist(), row.mask.tolist()
        assert ids[: len(prefixes.ids)] == prefixes.ids
        expected, told = [0] * len(ids), 0
        for turn, one in enumerate(prefixes.messages):
            if one["role"] != "assistant" or turn < first:
                continue
            start, stop = prefixes.start(turn), prefixes.stop(turn)
            told += None not in (start, stop)
            if start is None:
                start = mask.index(1, max(place for place, one in enumerate([1, *expected]) if one))
            if stop is None:
                stop = mask.index(0, start)
            expected[start : len(ids) if stop > len(prefixes.ids) else stop] = [1] * (
                (len(ids) if stop > len(prefixes.ids) else stop) - start)
            assert ids[(stop if stop <= len(prefixes.ids) else len(ids)) - 1] in prefixes.stops
        assert len(ids) == len(prefixes.ids) or self.theirs.decode(
            ids[len(prefixes.ids):]).strip() in stops_of(self.name)
        assert told and mask == expected, self.spell(ids, mask, expected)

    def check_refusal(self, row, messages, tools):
        """What is said to be lost is not in the text that transformers renders, or it renders none."""
        try:
            text = self.theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception:
            assert row.bucket == "template_error"
            return
        if row.bucket == "turn_unclear":
            return
        lost = {"reasoning_lost": ["THOUGHTONE", "THOUGHTTWO"], "tool_call_lost": ["addnumbers", "ARGUMENTONE"],
                "turn_lost": ["addnumbers", "ARGUMENTONE"], "tools_lost": ["addnumbers"],
                "content_lost": [one["content"] for one in messages if one["content"]]}[row.bucket]
        assert any(text.count(part) < sum(str(one).count(part) > 0 for one in messages) for part in lost), (
            row.reason, text)

    def spell(self, ids, mask, expected):
        """The tokens around those in which the masks differ: our mask, the oracle's."""
        differ = [place for place, pair in enumerate(zip(mask, expected)) if pair[0] != pair[1]] or [0]
        window = range(max(0, differ[0] - 8), min(len(ids), differ[-1] + 8))
        return " ".join(f"{self.theirs.convert_ids_to_tokens(ids[place])}[{mask[place]}{expected[place]}]"
                        for place in window)
