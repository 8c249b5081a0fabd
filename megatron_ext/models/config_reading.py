"""Read and write a config.json, as every family does it. No torch.

A key is either read, or has the one value that we have code for, or has no effect on the model's function; any other
that is set is refused, so that a model is never almost the right one. config_meaning.py holds what was read against the
file.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from data_tools.mistake import Problem

DTYPES = ("float32", "bfloat16", "float16")
WITHOUT_EFFECT = {  # special tokens, initial values, caches and outputs, names
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "model_type", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
    "is_llama_config", "max_sequence_length", "transformers.js_config", "unsloth_fixed",  # of other programs
}  # fmt: skip
OFF = dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder", "rope_interleaved"), False)  # of none
MOST_LAYERS, LARGEST = 1 << 16, 1 << 40  # what is known of each layer is listed; no model has sizes near to these
BESIDE_ROPE = {"rope_theta", "partial_rotary_factor"}  # older files have them beside the other settings
ROPE_KEYS = ("rope_parameters", "rope_scaling", *sorted(BESIDE_ROPE))


class Reading:
    """Reads a parsed config.json of `family`, and in `problems` every reason why it is not understood."""

    def __init__(self, config: Mapping[str, Any], where: str, family: str):
        self.config, self.where, self.family = config, where, family
        self.problems: list[Problem] = []

    def wrong(self, message: str) -> None:
        self.problems.append(Problem(self.where, message))

    def refuse(self, key: str, value: Any, remedy: str) -> None:
        self.wrong(f"{key} = {value!r} is not supported for {self.family}: {remedy}")

    def sizes(self, names: Mapping[str, str]) -> dict[str, int]:
        """Return {field: value} of {field: key}, each a positive number that the file must have.

        A field whose key is missing, no size, or more than any model has, is left out, and is a problem.
        """
        sizes = {}
        for field, key in names.items():
            value = self.config.get(key)
            if value is None:
                self.wrong(f"{key} is missing")
            elif type(value) is not int or value < 1:
                self.wrong(f"{key} is {value!r}, not a size")
            elif value > (most := MOST_LAYERS if field == "layers" else LARGEST):
                self.wrong(f"{key} is {value:,}, more than {most:,}, the most that is read")
            else:
                sizes[field] = value
        return sizes

    def number(self, key: str, default: float, of: Mapping[str, Any] | None = None) -> float:
        """Return a positive number of the file, or of the mapping `of` in it; `default` where there is none."""
        value = (self.config if of is None else of).get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.wrong(f"{key} is {value!r}, not a positive number")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value not in (None, True, False):
            self.wrong(f"{key} is {value!r}, neither true nor false")
        return default if value is None else bool(value)

    def words(self, key: str) -> list[str]:
        """Return a list of words; [] where there is none."""
        value = self.config.get(key)
        if value is None or (isinstance(value, list) and all(isinstance(word, str) for word in value)):
            return value or []
        self.wrong(f"{key} is {value!r}, not a list of words")
        return []

    def only(self, values: Mapping[str, Any]) -> None:
        """Refuse other values of keys that may have one value; a key that is missing or null has it too.

        Where missing means something else than null (Mistral's sliding_window), a family reads the key itself.
        """
        for key, value in values.items():
            if self.config.get(key) not in (None, value):
                self.refuse(key, self.config[key], f"only {value!r} is")

    def known(self, keys: Collection[str]) -> None:
        """Refuse what is set, be it to false, and neither in `keys` nor without effect."""
        self.only(OFF)
        for key in sorted(self.config.keys() - WITHOUT_EFFECT - OFF.keys() - set(keys)):
            if self.config[key] is not None and not key.startswith("_"):
                self.refuse(key, self.config[key], "it is not known; remove it if the model does not depend on it")

    def agree(self, key: str, value: Any, other: str, theirs: Any) -> None:
        """Refuse two spellings of one thing that say different things; one that is None says nothing."""
        if value is not None and theirs is not None and not alike(value, theirs):
            self.wrong(f"{key} is {value!r} and {other} is {theirs!r}: keep the right one")

    def dtype(self, default: str = "float32") -> str:
        """Return the dtype of the weights, "float32" or another of DTYPES."""
        new, old = (self.config.get(key) for key in ("dtype", "torch_dtype"))
        spelled = [None if name is None else str(name).removeprefix("torch.") for name in (new, old)]
        self.agree("dtype", spelled[0], "torch_dtype", spelled[1])
        dtype = spelled[0] or spelled[1] or default
        if dtype not in DTYPES:
            self.refuse("dtype", dtype, f"use {', '.join(DTYPES)}")
        return dtype

    def groups(self, heads: int, default: int | None = None) -> int:
        """Return the number of key-value heads, which must share the `heads` query heads evenly.

        null means as many, a missing key `default`.
        """
        groups = self.config.get("num_key_value_heads", default)
        groups = heads if groups is None else groups
        if type(groups) is not int or groups < 1:
            self.wrong(f"num_key_value_heads is {groups!r}, not a size")
        elif heads % groups:
            self.wrong(f"{heads} attention heads do not divide by {groups} key-value heads")
        return groups

    def rope(
        self,
        default: Mapping[str, Any],
        base: float,
        head_dim: int,
        kinds: Mapping[str, Collection[str]],
        partial: float | None = None,
    ) -> dict[str, Any]:
        """Return the rotary settings, with rope_type and rope_theta, and with partial_rotary_factor where a model may
        turn a part of each head: `partial` is then what it is where a file does not say.

        `kinds` has the keys that each known type may have besides, `default` is what transformers takes where a file
        has none.

        transformers 5 nests them, older files have rope_theta and rope_scaling beside the others; a file may have both.
        """
        if head_dim % 2:
            self.wrong(f"head size {head_dim} is odd: rotary positions need an even one")
        new, old = self._rope_settings("rope_parameters"), self._rope_settings("rope_scaling")
        if new and old:
            for name in sorted((new.keys() | old.keys()) - BESIDE_ROPE):
                ours, theirs = (settings.get(name, "absent") for settings in (new, old))
                self.agree(f"rope_parameters.{name}", ours, "rope_scaling's", theirs)
        rope = {**(new or old or default)}
        for name in sorted(BESIDE_ROPE):
            places = {"the file's": self.config, "rope_parameters'": new, "rope_scaling's": old}
            said = {whose: place[name] for whose, place in places.items() if place.get(name) is not None}
            for whose, value in said.items():
                self.agree(name, next(iter(said.values())), whose, value)
                rope[name] = value
        rope["rope_type"] = rope.get("rope_type", "default")
        rope["rope_theta"] = float(self.number("rope_theta", base, rope))
        share = self._share(rope, head_dim, partial)
        if not isinstance(rope["rope_type"], str) or rope["rope_type"] not in kinds:
            self.refuse("rope_type", rope["rope_type"], f"{' and '.join(kinds)} are")
            return rope
        for key in sorted(rope.keys() - {"rope_type", "rope_theta"} - set(kinds[rope["rope_type"]])):
            self.refuse(f"rope_parameters.{key}", rope[key], "remove it if the model does not need it")
        return rope if partial is None else {**rope, "partial_rotary_factor": share}

    def _share(self, rope: dict[str, Any], head_dim: int, partial: float | None) -> float:
        """Take the share of a head that positions turn out of `rope`; without `partial` it may be 1 only."""
        share = self.number("partial_rotary_factor", partial or 1.0, rope)
        rope.pop("partial_rotary_factor", None)
        turned = int(head_dim * share)
        if share != 1 and (partial is None or share > 1 or turned < 2 or turned % 2):
            also = f", or an even part of {head_dim}" if partial else ""
            self.refuse("partial_rotary_factor", share, f"use 1.0{also}")
        return float(share)

    def _rope_settings(self, key: str) -> dict[str, Any]:
        """Return the rotary settings that the file nests below `key`, rope_type among them; {} where there are none."""
        nested = self.config.get(key) or {}
        if not isinstance(nested, dict):
            self.refuse(key, nested, "it has settings by name")
            return {}
        settings = {name: value for name, value in nested.items() if value is not None}
        return {"rope_type": settings.pop("type", "default"), **settings} if settings else {}


def alike(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are the same; 0 is not false, and 1 not true, as they are to Python."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def file_of(dims: Any, architecture: str, model_type: str, eos: int | None, pad: int | None) -> dict[str, Any]:
    """Return what every family's config.json has, as transformers 4 and 5 both read it."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "vocab_size": dims.vocabulary,
        "max_position_embeddings": dims.max_positions,
        "initializer_range": 0.02,
        "torch_dtype": dims.dtype,
        "dtype": dims.dtype,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def small_dims(dims: type, sizes: Any, vocabulary: int, **own: Any) -> Any:
    """Return a family's `dims` of the model that init_model's `sizes` ask for: what both name alike, and its `own`."""
    alike = {field.name: getattr(sizes, field.name) for field in fields(dims) if hasattr(sizes, field.name)}
    return dims(**{**alike, "vocabulary": vocabulary, **own})
