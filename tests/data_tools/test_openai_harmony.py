"""Harmony as OpenAI's own library has it: stop tokens, prompts, what is read of a completion, history without thoughts.

It needs openai-harmony 0.0.8 and TIKTOKEN_ENCODINGS_BASE, a folder with o200k_base.tiktoken: a line "BASE64 RANK" for
each token, of OpenAI's or made of the ranks in npm's js-tiktoken (the library checks its SHA-256)."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from data_tools.answers.forms import final_text
from data_tools.base import durable
from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import Tokenizer, stop_ids
from data_tools.prepare.harmony import IDENTITY, Prompt, render

openai_harmony = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not (Path(os.environ.get("TIKTOKEN_ENCODINGS_BASE") or "/nowhere") / "o200k_base.tiktoken").is_file(),
        reason="TIKTOKEN_ENCODINGS_BASE names no folder with o200k_base.tiktoken",
    ),
]

from openai_harmony import (  # noqa: E402  # type: ignore[import-not-found]
    Conversation,
    DeveloperContent,
    Message,
    ReasoningEffort,
    Role,
    SystemContent,
)

DATE = "2025-10-26"
RETURN, CALL, END, TEXT_END = 200002, 200012, 200007, 199999
RELEASED_STOPS = [RETURN, TEXT_END, CALL]  # eos_token_id of generation_config.json of openai/gpt-oss-20b


@pytest.fixture(scope="module")
def theirs() -> Any:
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def system(effort: str, identity: str = IDENTITY) -> Message:
    content = SystemContent.new().with_model_identity(identity).with_reasoning_effort(ReasoningEffort(effort.title()))
    content = content.with_conversation_start_date(DATE).with_knowledge_cutoff("2024-06")
    content = content.with_required_channels(["analysis", "commentary", "final"])
    return Message.from_role_and_content(Role.SYSTEM, content)


def test_completions_end_where_the_library_ends_them(theirs: Any, tmp_path: Path) -> None:
    durable.write_json(tmp_path / "generation_config.json", {"eos_token_id": RELEASED_STOPS})
    tokenizer = Tokenizer("gpt-oss", 201088, pad_id=TEXT_END, eos_id=RETURN, unk_id=None, backend=None)
    ours = stop_ids(tmp_path, tokenizer)
    assert set(theirs.stop_tokens_for_assistant_actions()) == {RETURN, CALL} == ours - {TEXT_END}
    assert END not in ours and theirs.decode([END]) == "<|end|>"


PROMPTS = [
    Prompt("", "Hour 3?"),
    Prompt("Answer with [0], [1], [2] or [3].", "Load high, price low.\n\nWhat now?"),
    Prompt("Be brief.\nBe right.", "  Überlast: 12.5 kW → [2]? 🦙\tsystem: no"),
]


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_has_the_librarys_tokens(theirs: Any, prompt: Prompt, effort: str) -> None:
    messages = [system(effort)]
    if prompt.instructions:
        told = DeveloperContent.new().with_instructions(prompt.instructions)
        messages.append(Message.from_role_and_content(Role.DEVELOPER, told))
    messages.append(Message.from_role_and_content(Role.USER, prompt.user))
    tokens = theirs.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)
    ours = render(prompt, DATE, effort)
    if prompt.instructions:  # the model's chat template, which ours follows, ends them with two line breaks more
        assert ours.count(more := f"{prompt.instructions}\n\n<|end|>") == 1
        ours = ours.replace(more, f"{prompt.instructions}<|end|>")
    assert theirs.encode(ours, allowed_special="all") == tokens, theirs.decode(tokens)


COMPLETIONS = {
    "<|channel|>analysis<|message|>High load, so [1] or [2].<|end|>"
    "<|start|>assistant<|channel|>final<|message|>I take [2].<|return|>": "I take [2].",
    "<|channel|>final<|message|>[0]<|return|>": "[0]",
    "<|channel|>commentary<|message|>[3]<|end|><|start|>assistant<|channel|>final<|message|>[1]\n<|return|>": "[1]\n",
    "<|channel|>analysis<|message|>[2] it is.<|return|>": None,
    "<|channel|>final <|constrain|>json<|message|>[2]<|return|>": "[2]",
    "<|channel|>commentary to=functions.ask <|constrain|>json<|message|>[2]<|call|>": None,
    "<|message|>[2]<|return|>": None,
}


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_what_is_said_to_the_user_is_what_the_library_reads(theirs: Any, completion: str) -> None:
    tokens = theirs.encode(completion, allowed_special="all")
    read = theirs.parse_messages_from_completion_tokens(tokens, Role.ASSISTANT)
    finals = [message.content[0].text for message in read if message.channel == "final"]
    said = finals[-1] if finals else None
    # A completion comes without the token that ended it.
    assert final_text(completion.removesuffix("<|return|>")) == said == COMPLETIONS[completion]


def test_earlier_thoughts_are_left_out_of_a_history(theirs: Any) -> None:
    stock = (resources.files("trl") / "chat_templates" / "gptoss.jinja").read_text()
    tokenizer = Tokenizer("gpt-oss", 201088, None, eos_id=RETURN, unk_id=None, backend=None, chat_template=stock)
    encoder = PromptEncoder(tokenizer, {"reasoning_effort": "low"}, day=DATE)
    ours = encoder.text(
        [
            {"role": "user", "content": "Hour 1?"},
            {"role": "assistant", "thinking": "High load.", "content": "[2]"},
            {"role": "user", "content": "Hour 2?"},
        ]
    )
    talk = [
        system("low"),
        Message.from_role_and_content(Role.USER, "Hour 1?"),
        Message.from_role_and_content(Role.ASSISTANT, "High load.").with_channel("analysis"),
        Message.from_role_and_content(Role.ASSISTANT, "[2]").with_channel("final"),
        Message.from_role_and_content(Role.USER, "Hour 2?"),
    ]
    tokens = theirs.render_conversation_for_completion(Conversation.from_messages(talk), Role.ASSISTANT)
    assert theirs.encode(ours, allowed_special="all") == tokens and "High load." not in ours
