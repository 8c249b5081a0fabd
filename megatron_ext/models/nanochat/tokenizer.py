"""nanochat's tokenizer.pkl → tokenizer.json and a chat template, as transformers reads them; it goes along, too.

The file is a pickled tiktoken.Encoding (nanochat/tokenizer.py, RustBPETokenizer.save): a pattern that cuts text into
pieces, byte sequences with their ranks, and special tokens. Byte-level BPE says the same: of the pairs in a piece the
one is joined first whose joint has the lowest rank, so each way to cut a token in two is a merge of that token's rank.
A chat is written as nanochat's render_conversation does.
"""

import shutil
from pathlib import Path
from typing import Any

from data_tools.base import bounds, durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake

FILE = "tokenizer.pkl"
BOS, END = "<|bos|>", "<|assistant_end|>"
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|user_start|>{{ messages[0].content + '\\n\\n' if loop.index0 == 1 and messages[0].role == 'system' else '' -}}
{{- message.content -}}<|user_end|>
{%- elif message.role == 'assistant' -%}
<|assistant_start|>{{- message.content -}}<|assistant_end|>
{%- elif message.role != 'system' or not loop.first or messages|length < 2 or messages[1].role != 'user' -%}
{{- raise_exception('nanochat knows user, assistant, and one system message before a user; not ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant_start|>{%- endif -%}
"""
_ENCODING = ("tiktoken.core", "Encoding")
_KNOWN = frozenset({_ENCODING, ("copyreg", "__newobj__"), ("copyreg", "_reconstructor"), ("builtins", "object")})


def has_own(folder: Path) -> bool:
    """Return whether a folder has nanochat's tokenizer, and none that transformers reads."""
    return (folder / FILE).is_file() and not (folder / "tokenizer.json").is_file()


def convert(folder: Path, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `out`, and the file as it is. Raises UserMistake where it is
    none of nanochat's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pattern, ranks, special = _read(inside(folder, FILE))
    names = _spelling()
    spell = {token: "".join(names[byte] for byte in token) for token in ranks}
    model = models.BPE({spell[token]: rank for token, rank in ranks.items()}, _merges(ranks, spell), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    in_order = sorted(special, key=lambda name: special[name])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in in_order])
    wrong = [name for name in in_order if tokenizer.token_to_id(name) != special[name]]
    if wrong:
        message = f"its special tokens do not follow its {len(ranks):,} others: {', '.join(wrong)}"
        raise UserMistake(Problem(str(folder / FILE), message))
    durable.write_file(out / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END,
              "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}  # fmt: skip
    durable.write_json(out / "tokenizer_config.json", config)
    if folder != out:
        shutil.copyfile(inside(folder, FILE), out / FILE)


def _read(path: Path | None) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Return (pattern, byte sequence -> rank, special token -> id) of a pickled Encoding."""
    from megatron_ext.files import pickles

    assert path is not None
    try:
        node = pickles.nodes(bounds.read_bytes(path, bounds.JSON), _KNOWN)
        state = node.state if isinstance(node, pickles.Node) and node.pair == _ENCODING else None
    except pickles.Refused as error:
        raise UserMistake(Problem(str(path), f"is no tokenizer of nanochat: {error}")) from None
    if not isinstance(state, dict):
        raise UserMistake(Problem(str(path), "is no tokenizer of nanochat: no tiktoken Encoding with its own ranks"))
    values: list[Any] = [state.get(key) for key in ("pat_str", "mergeable_ranks", "special_tokens")]
    pattern, ranks, special = values
    if not (isinstance(pattern, str) and _are_ids(ranks, bytes) and _are_ids(special, str)):
        raise UserMistake(Problem(str(path), "has no pat_str, mergeable_ranks and special_tokens of their types"))
    if missing := [name for name in (BOS, END) if name not in special]:
        raise UserMistake(Problem(str(path), f"has no special token {' and '.join(missing)}, as nanochat's have"))
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserMistake(
            Problem(str(path), f"its {len(ranks):,} ranks are not 0 to {len(ranks) - 1:,}, or lack a byte")
        )
    return pattern, ranks, special


def _are_ids(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(key) is kind and type(item) is int for key, item in value.items())


def _merges(ranks: dict[bytes, int], spell: dict[bytes, str]) -> list[tuple[str, str]]:
    """Return the merges in their order: by the rank of what they make, and then of their parts."""
    merges = []
    for token, rank in ranks.items():
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(rank, ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    return [(spell[a], spell[b]) for *_, a, b in sorted(merges, key=lambda merge: merge[:3])]


def _spelling() -> list[str]:
    """Return the character that byte-level BPE writes for each byte (GPT-2): its own where it is visible, else one from
    256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
