"""Stock chat templates: ids are transformers', masks those of an oracle by growing prefixes, refusals are true."""

import functools
import json
import os
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from data_tools.chats.chat import ChatConfig, ChatRows, Encoded
from data_tools.chats.conversation import Conversation
from data_tools.chats.encoder import Encoder
from data_tools.chats.spans import Unclear
from data_tools.chats.template import ChatTemplate
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.chats.turns import Turns
from data_tools.mistake import UserMistake
from tests.data_tools.chats import TEMPLATES, message
from tests.data_tools.oracle import Prefixes, stops_of, tokenizer_for

STOCK = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
# Those of MORE that no row can be trained with, and why.
UNTRAINABLE = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "its generation prompt does not begin an assistant's turn",
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",  # an argument that has to be given
    "llama-cpp-rwkv-world": "nothing ends an assistant's turn",
}
# llama.cpp's models/templates, as they are in the sdist of llama-cpp-python.
MORE = sorted(Path(os.environ.get("AFTEROK_TEMPLATES", "/nowhere")).glob("*.jinja"))

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "addnumbers",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "first": {"type": "integer", "description": "One."},
                    "text": {"type": "string", "description": "Other."},
                },
                "required": ["first"],
            },
        },
    }
]


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
            one["tool_calls"] = [
                {**given, "function": {**given["function"], "arguments": json.dumps(given["function"]["arguments"])}}
                for given in one["tool_calls"]
            ]
        if name.startswith(PARTS):
            one["content"] = [{"type": "text", "text": one["content"]}]
        if name.startswith(REASONING) and "thinking" in one:
            one["reasoning"] = one["thinking"]
    return messages


# Of each kind of CHATS: equal, or the bucket of the refusal. The first of each family is in the default tests.
TABLE = {
    "cohere": "equal template_error reasoning_lost template_error",
    "cohere2": "equal template_error reasoning_lost template_error",
    "deepseek_r1_distill": "equal tool_call_lost reasoning_lost tool_call_lost",
    "deepseekv3": "equal tools_lost reasoning_lost reasoning_lost",
    "diffusion_gemma": "equal turn_unclear equal turn_unclear",
    "gemma": "equal template_error reasoning_lost template_error",
    "gemma3": "equal template_error reasoning_lost template_error",
    "gemma4": "equal equal reasoning_lost reasoning_lost",
    "gemma4_v2": "equal equal reasoning_lost reasoning_lost",
    "gemma4_v3": "equal equal reasoning_lost reasoning_lost",
    "gemma4_v4": "equal equal reasoning_lost reasoning_lost",
    "gemma4_v5": "equal equal equal equal",
    "glm4moe": "equal equal equal equal",
    "gptoss": "equal equal equal reasoning_lost",
    "idefics3": "equal tool_call_lost reasoning_lost tool_call_lost",
    "lfm2": "equal tool_call_lost reasoning_lost tool_call_lost",
    "lfm2_2_5": "equal equal equal equal",
    "lfm2_2_5_v2": "equal equal equal equal",
    "lfm2_2_5_vl": "equal equal equal equal",
    "lfm2_v2": "equal equal reasoning_lost reasoning_lost",
    "llama3": "equal tool_call_lost reasoning_lost tool_call_lost",
    "llama3_1": "equal equal reasoning_lost reasoning_lost",
    "llama3_2": "equal equal reasoning_lost reasoning_lost",
    "llava_next": "equal template_error reasoning_lost template_error",
    "muse_glimmer": "equal equal equal equal",
    "nemotron_3_5_lightning": "equal equal equal equal",
    "nemotron_3_nano": "equal equal equal equal",
    "nemotron_3_super": "equal equal equal equal",
    "nemotron_3_ultra": "equal equal equal equal",
    "phi3": "equal tool_call_lost reasoning_lost tool_call_lost",
    "phi3_5": "equal tool_call_lost reasoning_lost tool_call_lost",
    "qwen2_5": "equal equal reasoning_lost reasoning_lost",
    "qwen2_5_vl": "equal tool_call_lost reasoning_lost tool_call_lost",
    "qwen3": "equal equal equal equal",
    "qwen3_5_nothink": "equal equal equal equal",
    "qwen3_5_think": "equal equal equal equal",
    "qwen3_6": "equal equal equal equal",
    "qwen3_8": "equal equal equal equal",
    "qwen3_instruct_2507": "equal equal reasoning_lost reasoning_lost",
    "qwen3_vl": "equal equal reasoning_lost reasoning_lost",
    "smolvlm": "equal tool_call_lost reasoning_lost tool_call_lost",
}  # fmt: skip
QUICK = ("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "diffusion_gemma", "gemma", "gemma3", "gemma4_v5",
         "glm4moe", "gptoss", "idefics3", "lfm2", "lfm2_2_5", "lfm2_v2", "llama3", "llama3_1", "llava_next",
         "muse_glimmer", "nemotron_3_nano", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_8", "qwen3_vl",
         "smolvlm")  # fmt: skip


class Trial:
    """A template with a tokenizer that has its special tokens, ours and transformers'."""

    def __init__(self, path, folder, normalizer=None):
        self.name = path.stem
        self.theirs = tokenizer_for(self.name, path.read_text(), CHATS.values(), normalizer)
        self.theirs.save_pretrained(folder)
        self.ours = load_tokenizer(str(folder))
        self.config = ChatConfig(schema="messages", template=str(path), date=date.today().isoformat())
        self.chats = functools.cache(lambda: ChatRows(self.config, self.ours, Encoder(self.ours, "huggingface")))

    def outcome(self, messages, tools, turns):
        """("equal", "") or the bucket and the reason of what is refused; asserts that either is true."""
        try:
            self.chats().config = replace(self.config, turns=turns)
            rows = list(self.chats().rows({"messages": messages, "tools": tools}))
        except UserMistake as mistake:
            return "refused", str(mistake)
        users = [number for number, one in enumerate(messages) if one["role"] == "user"]
        ends = [*users[1:], len(messages)] if turns == "each" else [len(messages)]
        for row, end in zip(rows, ends, strict=True):
            read = as_read(self.name, messages[:end])
            if not isinstance(row, Encoded):
                self.check_refusal(row, read, tools)
                return row.bucket, row.reason
            first = max(user for user in users if user < end) if turns == "each" else 0
            doubles = self.name == "unsloth-Apriel-1.5"
            self.check(row, Prefixes(self.theirs, read, tools, stops_of(self.name), doubles), first)
        return "equal", ""

    def check(self, row, prefixes, first):
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
                (len(ids) if stop > len(prefixes.ids) else stop) - start
            )
            assert ids[(stop if stop <= len(prefixes.ids) else len(ids)) - 1] in prefixes.stops
        assert len(ids) == len(prefixes.ids) or self.theirs.decode(ids[len(prefixes.ids) :]).strip() in stops_of(
            self.name
        )
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
        said = [str(value) for one in messages for key, value in one.items() if key in ("content", "reasoning_content")]
        called = [given["function"] for one in messages for given in one.get("tool_calls", ())]
        named = [given["name"] for given in called] + ["ARGUMENTONE"] * len(called)
        fields = {
            "reasoning_lost": said,
            "content_lost": said,
            "tool_call_lost": named,
            "turn_lost": named,
            "tools_lost": [tool["function"]["name"] for tool in tools or ()] + named,
        }[row.bucket]
        assert any(text.count(part) < sum(one.count(part) for one in fields) for part in fields), (row.reason, text)

    def spell(self, ids, mask, expected):
        """The tokens around those in which the masks differ: our mask, the oracle's."""
        differ = [place for place, pair in enumerate(zip(mask, expected)) if pair[0] != pair[1]] or [0]
        window = range(max(0, differ[0] - 8), min(len(ids), differ[-1] + 8))
        return " ".join(
            f"{self.theirs.convert_ids_to_tokens(ids[place])}[{mask[place]}{expected[place]}]" for place in window
        )


def outcomes(path, folder):
    """What becomes of each of CHATS, a row a question, by kind; and all turns in one row are no other but unclear."""
    trial = Trial(path, folder)
    found = {}
    for kind, (messages, tools) in CHATS.items():
        found[kind], reason = trial.outcome(messages, tools, "each")
        together, reason = trial.outcome(messages, tools, "all")
        assert together in (found[kind], "turn_unclear"), reason
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.soak) for name in STOCK]
)
def test_a_stock_template_gives_the_ids_of_transformers_and_the_masks_of_prefixes_or_is_refused(name, tmp_path):
    assert list(outcomes(TEMPLATES / f"{name}.jinja", tmp_path).values()) == TABLE[name].split()


@pytest.mark.soak
@pytest.mark.parametrize("path", MORE, ids=lambda path: path.stem)
def test_templates_of_other_places_give_the_masks_of_prefixes_or_are_refused(path, tmp_path):
    if reason := UNTRAINABLE.get(path.stem):
        with pytest.raises(UserMistake, match=reason):
            Trial(path, tmp_path).chats()
        return
    found = outcomes(path, tmp_path)
    lost = {f"{kind}_lost" for kind in ("reasoning", "content", "tool_call", "tools", "turn")}
    assert "equal" in found.values() and set(found.values()) <= {"equal", "template_error", "turn_unclear", *lost}


# What is said: texts that look like tags, and that a normal form changes.
PIECES = st.sampled_from([
    "a", "word ", "B2", ".", " ", "\n", "\n\n", "<think>", "</think>", "<|im_end|>", "<|im_start|>user\n",
    "<tool_call>", "</tool_call>", "<|user|>", "<|end|>", "{", '"', "\\", "é", "e\u0301", "\u095c\u095c",
    "\u212a\u212a\u212a", "世☕",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=6).map("".join)
SAID = TEXTS.map(lambda text: f"so{text}it")
THOUGHTS = st.none() | SAID
# -- templates that end a turn within the next message -----------------------------------------------------------------

APERTUS = """
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|assistant_end|>' if not loop.first }}<|user_start|>{{ m.content }}
{%- elif m.role == 'assistant' %}{{ ']' if loop.previtem.role == 'tool' else '<|assistant_start|>' }}{{ m.content }}
{%- for c in m.tool_calls or [] %}<|tools_prefix|>{{ c.function | tojson }}<|tools_suffix|>{% endfor %}
{%- else %}{{ '[' if loop.previtem.role != 'tool' else ', ' }}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ ']' if messages[-1].role == 'tool' else '<|assistant_start|>' }}{% endif %}"""
GLM = """
{%- for m in messages %}{% if m.role == 'tool' %}
{{- '<|observation|>' if loop.previtem.role != 'tool' }}<tool_response>{{ m.content }}</tool_response>
{%- else %}<|{{ m.role }}|>{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
JAMBA = """
{%- for m in messages %}{{ '<|eom|>' if not loop.first }}<|bom|><|{{ m.role }}|> {{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_calls>{{ c.function | tojson }}</tool_calls>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}<|eom|><|bom|><|assistant|> {% endif %}"""


@pytest.mark.parametrize(("source", "stops"), [
    (APERTUS, {"user": "<|assistant_end|>", "tool": "<|tools_suffix|>"}),
    (GLM, {"user": "<|user|>", "tool": "<|observation|>"}), (JAMBA, {"user": "<|eom|>", "tool": "<|eom|>"}),
], ids=["Apertus", "GLM-4.7", "Jamba"])  # fmt: skip
def test_nothing_of_the_next_message_is_in_a_turn_that_it_ends(source, stops):
    turns = Turns(ChatTemplate(source, {}, {}, date(2026, 1, 1)))

    @given(st.lists(st.tuples(TEXTS, SAID, st.booleans()), min_size=1, max_size=4))
    def check(said):
        messages = []
        for asked, answer, calls in said:
            messages += [
                message("user", asked),
                *(
                    [message("assistant", "", tool_calls=[call("c1", text="x")]), message("tool", asked)]
                    if calls
                    else []
                ),
                message("assistant", answer),
            ]
        text, spans, _ = turns.render(Conversation(messages))
        for span in spans:
            one, turn = messages[span.message], text[span.start : span.stop]
            stop = stops["tool" if one.get("tool_calls") else "user"]
            assert turn.startswith(one["content"]) and turn.endswith(stop)
            assert turn == one["content"] + stop or one.get("tool_calls")
            assert turn.count("<|") == one["content"].count("<|") + (2 if "<|tools_prefix|>" in turn else 1)
        assert [span.message for span in spans] == [
            number for number, one in enumerate(messages) if one["role"] == "assistant"
        ]

    check()


# -- templates whose loop over messages cannot be marked ---------------------------------------------------------------

INDEXED = """
{%- for i in range(messages|length) %}{% set m = messages[i] %}
{%- if m.role == 'assistant' %}[|assistant|]
{% if loop.last and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% else %}<think>

</think>

{% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}[|endofturn|]
{% else %}[|{{ m.role }}|]
{{ m.content }}[|endofturn|]
{% endif %}{% endfor %}
{%- if add_generation_prompt %}[|assistant|]
{% endif %}"""
LAST_APART = """
{%- set said = messages[:-1] if messages[-1].role == 'assistant' else messages %}
{%- for m in said %}{% if m.role == 'assistant' %}{{ '<S11>Assistant\n' + m.content.split('</think>')[-1]|trim }}
{%- for c in m.tool_calls or [] %}<CALL>{{ c.function | tojson }}</CALL>{% endfor %}{{ '\n<S12>\n' }}
{%- else %}{{ '<S11>' + m.role + '\n' + m.content|trim + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt or messages[-1].role == 'assistant' %}{{ '<S11>Assistant\n<think>\n' }}{% endif %}
{%- if messages[-1].role == 'assistant' %}{{ messages[-1].content|trim + '\n<S12>\n' }}{% endif %}"""


@pytest.mark.parametrize(("source", "stop"), [
    (INDEXED, "[|endofturn|]"), (LAST_APART, "\n<S12>"),
], ids=["numbers (EXAONE-4)", "last apart (Nemotron-Nano-v2)"])  # fmt: skip
def test_turns_are_told_where_no_loop_over_messages_can_be_marked(source, stop):
    turns = Turns(ChatTemplate(source, {}, {}, date(2026, 1, 1)))

    @given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4))
    def check(said):
        answers = [answer.replace("think>", "") for _, answer in said]
        messages = [
            one
            for (asked, _), answer in zip(said, answers)
            for one in (message("user", asked), message("assistant", answer))
        ]
        rendered = turns.render(Conversation(messages))
        text, spans, by_prefixes = rendered
        assert by_prefixes and text == turns.template.text(Conversation(messages))
        assert [span.message for span in spans] == list(range(1, len(messages), 2))
        for span, answer in zip(spans, answers):
            turn = text[span.start : span.stop]
            assert turn.replace("<think>", "").replace("</think>", "").strip() == f"{answer}{stop}"

    check()


def test_a_header_is_no_stop_of_a_template_that_writes_no_calls():
    """Of ChatGLM's kind; with its generation prompt behind every conversation nothing ends the last turn."""
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
    turns = Turns(ChatTemplate(source, {}, {}, date(2026, 1, 1)))
    assert "<|assistant|>" not in turns.stop_texts
    with pytest.raises(Unclear):
        turns.render(Conversation([message("user", "What?"), message("assistant", "That.")]))


def test_each_row_that_prefixes_tell_is_looked_at_and_refused_by_name(tmp_path, monkeypatch):
    """Not one row in so many, as it is where marks tell the turns, and not the whole run."""
    path = tmp_path / "exaone.jinja"
    path.write_text(INDEXED)
    chats = Trial(path, tmp_path).chats()
    pair = [message("user", "What is it, what is it, and what was it then, after all?"), message("assistant", "It is.")]
    by_prefixes = Turns._by_prefixes

    def wrong(self, conversation, wanted):
        text, pieces = by_prefixes(self, conversation, wanted)
        return text, [replaced._replace(start=0) for replaced in pieces[:1]] + pieces[1:]

    assert [type(row) for row in chats.rows({"messages": pair * 2})] == [Encoded]
    monkeypatch.setattr(chats.turns, "_cut", wrong.__get__(chats.turns))
    monkeypatch.setattr(chats.turns, "_by_prefixes", chats.turns._cut)
    monkeypatch.setattr(chats.turns, "_headers_of", lambda conversation, number: [""])
    for _ in range(3):
        (row,) = chats.rows({"messages": pair * 2})
        assert row.bucket == "turn_unclear" and "message 1, of role user, is in the loss" in row.reason


# -- generated conversations ------------------------------------------------------------------------------------------

FAMILIES = ("qwen2_5", "qwen3", "glm4moe", "gptoss", "gemma4_v5", "muse_glimmer")


@st.composite
def chats(draw):
    """A question or more, each answered at once or after a call."""
    messages, tools = [], draw(st.booleans())
    for number in range(draw(st.integers(1, 3))):
        messages.append(message("user", draw(TEXTS)))
        if tools and draw(st.booleans()):
            given = call(f"call0000{number}", first=draw(st.integers(0, 99)), text=draw(TEXTS))
            messages += [
                message("assistant", "", tool_calls=[given]),
                message("tool", draw(TEXTS), name="addnumbers", tool_call_id=given["id"]),
            ]
        reasoning = draw(THOUGHTS)
        messages.append(message("assistant", draw(SAID), **(thought(reasoning) if reasoning else {})))
    return messages, TOOLS if tools else None


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_is_said_the_masks_are_those_of_prefixes(name, tmp_path):
    trial = Trial(TEMPLATES / f"{name}.jinja", tmp_path, normalizers.NFC())
    seen = Counter()

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(chats(), st.sampled_from(["all", "each"]))
    def check(chat, turns):
        assume(name != "glm4moe" or "<|user|>" not in json.dumps(chat))  # which would stop the oracle
        bucket, reason = trial.outcome(*chat, turns)
        assert bucket in ("equal", "turn_unclear", "reasoning_lost", "content_lost", "template_error"), reason
        seen[bucket] += 1

    check()
    assert seen["equal"] >= 5
