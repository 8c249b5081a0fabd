"""A tokenizer in Hugging Face format that encodes any text: one id for each byte of UTF-8, and no word to learn.

    <|pad|> 0   <|im_start|> 1   <|im_end|> 2   then the 256 bytes

It is byte-level BPE without merges, so that decoding is an exact round trip of every text. <|im_end|> ends an
assistant's turn and a task's answer. The chat template (ChatML) writes tools, names, reasoning, tool calls and results.
"""

from pathlib import Path

from data_tools.base.durable import write_file, write_json

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>tools\\n' -}}
{%- for tool in tools -%}{{- tool | tojson }}{{ '\\n' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + (' ' + message.name if message.name else '') + '\\n' -}}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' if message.reasoning_content else '' -}}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>\\n' -}}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
{{- '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""


def write_byte_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, the same bytes each time."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = [PAD, START, END]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # how each of the 256 bytes is spelled
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,  # no limit of its own; transformers warns without a number
            "chat_template": CHAT_TEMPLATE,
        },
    )
