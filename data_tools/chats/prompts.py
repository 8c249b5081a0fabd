"""A prompt to token ids: a text as transformers' tokenizer(text) has it, messages by the tokenizer's chat template, up
to where the model goes on."""

import datetime
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from data_tools.chats.conversation import BadRecord, read_prompt
from data_tools.chats.template import ChatTemplate, TemplateError
from data_tools.chats.tokenizer import NEVER, Tokenizer
from data_tools.mistake import UserMistake

_DAY = "2026-01-01"  # what templates are told today is, as in data_tools/chats/chat.py


class PromptEncoder:
    """Encodes prompts. `arguments` are for the template: enable_thinking, reasoning_effort, … `bos` says how a text
    begins: "" as transformers begins it (with a BOS, where the tokenizer adds one), NEVER as it stands. A template
    writes its own. `day`: what a template is told today is."""

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any] = {}, bos: str = "", day: str = _DAY):
        self.tokenizer, self.arguments, self.bos = tokenizer, arguments, bos
        self.day = datetime.date.fromisoformat(day)

    def encode(self, prompt: str | list[dict]) -> list[int]:
        """Raise UserMistake for messages where there is no template, or it refuses them."""
        opened = isinstance(prompt, str) and self.bos != NEVER
        return (self.tokenizer.encode_opened if opened else self.tokenizer.encode)(self.text(prompt))

    def text(self, prompt: str | list[dict]) -> str:
        if isinstance(prompt, str):
            return prompt
        try:
            return self._template.prompt(read_prompt(prompt))
        except (TemplateError, BadRecord) as error:
            raise UserMistake(
                f"chat template of {self.tokenizer.name}: {error}; the prompt is {str(prompt)[:80]}"
            ) from None

    @cached_property
    def _template(self) -> ChatTemplate:
        source = self.tokenizer.chat_template
        if not source:
            remedy = (
                "have the task write texts (options: {chat: false}), or give the model's folder a chat_template.jinja"
            )
            raise UserMistake(
                f"tokenizer {self.tokenizer.name} has no chat template for prompts that are messages; {remedy}"
            )
        return ChatTemplate(source, self.tokenizer.special_tokens, self.arguments, self.day)
