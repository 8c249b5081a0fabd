"""Run one of llama.cpp's converters, as `python guarded_converter.py SCRIPT ARGUMENTS`, with four changes.

* No code of a model's folder runs: some converters ask transformers to trust it.
* llama.cpp knows a byte-level BPE by the way it cuts text into words, of which it has a list. Its converter finds the
  name by a hash of ids, and so only for the vocabularies that it was shown. Where it knows none, the rule itself is
  looked up below: a vocabulary of one's own with the words of GPT-2, say, is as good as GPT-2's.
* gpt-oss's converter puts scales with the MXFP4 blocks that it saw last. Where files were cut between the two, these
  are another layer's, and nothing is said. Its tensors are then put in the order of their names.
* nemotron_h's converter finds the attention layers by words that transformers 5 writes otherwise, and would say that
  there are none. It is given the pattern as a string.

Exit code 2 and one line where a tokenizer has no counterpart in GGUF.
"""

import json
import runpy
import sys

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.models.nemotron_h.config import BLOCKS

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
# llama.cpp's name (src/llama-vocab.cpp, where the original expressions stand in comments) of the rule by which a
# tokenizer.json cuts words, and whether it then takes a whole word that is a token as it is (`ignore_merges`).
WORDS = {
    _ENDINGS + "|" + _LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES: ("qwen2", False),
    _ENDINGS + "|" + _LETTERS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES: ("llama-bpe", True),
    _START + _UPPER + "*" + _LOWER + "+" + _ENDINGS + "?|" + _START + _UPPER + "+" + _LOWER + "*" + _ENDINGS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES: ("gpt-4o", False),
}  # fmt: skip
GPT2 = ("gpt-2", False)  # the rule that a ByteLevel pre-tokenizer has of its own


class NoCounterpart(Exception):
    """A tokenizer that GGUF has nothing for."""


def words_of(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the words of a parsed tokenizer.json. Raise NoCounterpart where it has none."""
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise NoCounterpart(f"its tokenizer is a {model.get('type')}, and GGUF has byte-level BPE (and SentencePiece)")
    if not model.get("merges"):
        raise NoCounterpart("its tokenizer merges nothing, and llama.cpp loads no vocabulary without merges")
    name, whole_words = _cut(tokenizer.get("pre_tokenizer") or {})
    odd = [key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if (normalizer := tokenizer.get("normalizer")) and normalizer.get("type") != "NFC":  # llama.cpp normalises nothing
        odd.append(f"normalizer {normalizer.get('type')}")
    if bool(model.get("ignore_merges")) != whole_words:
        odd.append("ignore_merges")
    if odd:
        raise NoCounterpart(f"its tokenizer cuts words as llama.cpp's {name}, but has {', '.join(odd)}, unlike that")
    return name


def _cut(steps: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the entry of WORDS, or GPT2, that a pre_tokenizer is. Raise NoCounterpart where it is none."""
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds, last, found = [part.get("type") for part in parts], parts[-1], None
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        if len(parts) == 1 and last.get("use_regex", True):
            found = GPT2
        elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            cut = parts[0]
            if cut.get("behavior") == "Isolated" and not cut.get("invert"):
                found = WORDS.get(cut["pattern"].get("Regex"))
    if found is None:
        named = " and ".join(map(str, kinds))
        raise NoCounterpart(f"llama.cpp has no words like those of its tokenizer's pre_tokenizer ({named})")
    return found


def _untrusting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return from_pretrained without trust in remote code."""
    return lambda *args, **settings: method(*args, **settings | {"trust_remote_code": False})


def _or_by_its_words(known: Callable[..., str]) -> Callable[..., str]:
    """Return get_vocab_base_pre with `words_of` where the converter knows no name."""

    def name(converter: Any, tokenizer: Any) -> str:
        try:
            return known(converter, tokenizer)
        except NotImplementedError:
            fast = getattr(tokenizer, "backend_tokenizer", None)
            if fast is None:
                raise NoCounterpart("its tokenizer is no tokenizer.json") from None
            return words_of(json.loads(fast.to_str()))

    return name


def in_order(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tensors of a model's files, sorted by name if scales do not follow their own blocks."""
    last = ""
    for name in tensors:
        if name.endswith("_blocks"):
            last = name
        elif name.endswith("_scales") and name != last.replace("_blocks", "_scales"):
            return dict(sorted(tensors.items()))
    return tensors


def with_pattern(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json, as transformers understands it, with the layers of nemotron_h as a string."""
    layers = config.get("layers_block_type")
    if config.get("model_type") != "nemotron_h" or not layers:
        return config
    return config | {"hybrid_override_pattern": "".join(BLOCKS[layer] for layer in layers)}


def main() -> int:
    """Run the converter that the command line names."""
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    import transformers
    from conversion.base import ModelBase, TextModel  # llama.cpp's, beside the script

    for loader in (transformers.AutoTokenizer, transformers.AutoConfig):
        loader.from_pretrained = _untrusting(loader.from_pretrained)  # type: ignore[method-assign]  # as it is meant
    indexed = ModelBase.index_tensors
    ModelBase.index_tensors = lambda *args, **settings: in_order(indexed(*args, **settings))
    load = ModelBase.load_hparams
    ModelBase.load_hparams = staticmethod(lambda *args, **settings: with_pattern(load(*args, **settings)))
    TextModel.get_vocab_base_pre = _or_by_its_words(TextModel.get_vocab_base_pre)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except NoCounterpart as reason:
        print(reason, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
