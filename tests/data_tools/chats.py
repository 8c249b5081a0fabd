"""Conversations, tokenizers and templates for the tests: small ones of our own, TRL's templates, the shared files."""

import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_tools.base.durable import write_json
from tests.inputs import public

TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
SPECIAL = ["<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|eot_id|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Trains what a tool said, once a conversation is long enough not to be one of the probes.
GREEDY = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% elif m.role == 'assistant' %}A:"
    "{% generation %}"
    "{{ m.content }}{% if messages|length > 3 and messages[loop.index] and messages[loop.index].role == 'tool' %}"
    "{{ messages[loop.index].content }}{% endif %}"
    "<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
]
ASKED = message("user", "What is 2 + 2, and why? Ärger, 世界 ☕.")
ADDING = message("assistant", "", tool_calls=[call("add", a=2, b=2)])
FOUND = message(
    "tool", "The sum that the adder found is exactly four, no more and no less.", name="add", tool_call_id="c"
)
SOLVED = message("assistant", "Four, since 世界 counts ☕ so.")
THOUGHT = message("assistant", "It is 4.", reasoning_content="Two and two.\nFour.", thinking="Two and two.\nFour.")

CONVERSATIONS = {
    "one turn": [ASKED, SOLVED],
    "two turns": [
        message("system", "Be brief."), ASKED, SOLVED, message("user", "Sure?"), message("assistant", "Yes.")
    ],
    "tools": [message("system", "Use tools."), ASKED, ADDING, FOUND, SOLVED, message("user", "And 3 + 3?"),
              message("assistant", "", tool_calls=[call("add", a=3, b=3)]), message("tool", "6", name="add"),
              message("assistant", "Six.")],
    "ends with a tool": [ASKED, ADDING, FOUND],
    "ends with a question": [ASKED, SOLVED, message("user", "Sure?")],
    "thinking": [ASKED, THOUGHT, message("user", "Sure?"), THOUGHT],
}  # fmt: skip


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder, template=CHATML, special=SPECIAL, normalizer=None, words=None, **config):
    """A byte-level BPE of a few hundred tokens, as Qwen's and GPT-2's are of many."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if normalizer:
        tokenizer.normalizer = normalizer
    texts = [json.dumps(CONVERSATIONS, ensure_ascii=False), "a  b   c 1\n\n  d\t\t e\r\n"] * 3
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": "<|bos|>",
            "chat_template": template,
            **config,
        },
    )
    return folder


def nfc_tokenizer(folder):
    return write_tokenizer(folder, normalizer=normalizers.NFC(), words=QWEN_WORDS)


def template_of(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def tokenizer_of(inputs, folder, name):
    """The Qwen tokenizer as it is; GPT-2's, which has no config, with an end and a padding token of its own.

    Of the shipped ones the vocabulary is small; normal form, words, added tokens and configs are theirs.
    """
    qwen = name == "qwen3_rebuilt"
    if qwen and not inputs.shipped:
        return public("tokenizers", name)
    if inputs.shipped:
        more = {"normalizer": normalizers.NFC(), "words": QWEN_WORDS} if qwen else {}
        write_tokenizer(folder, special=QWEN_SPECIAL if qwen else ["<|endoftext|>"], **more)
    else:
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(public("tokenizers", name, "tokenizer.json").read_bytes())
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    if qwen:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    return folder
