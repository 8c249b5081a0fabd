"""Reading a config.json, as every family does it. No torch.

A key is either read, or has the one value that we have code for, or has no effect on the model's function; any other
that is set is refused, so that a model is never almost the right one.
"""

from typing import Any, Collection, Mapping

from data_tools.mistake import Problem

DTYPES = ("float32", "bfloat16", "float16")
WITHOUT_EFFECT = {  # special tokens, initial values, caches and outputs, names
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id",
    "model_type", "output_router_logits", "pad_token_id", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip


class Reading:
    """A parsed config.json of `family`, and in `problems` every reason why it is not understood."""

    def __init__(self, config: Mapping[str, Any], where: str, family: str):
        self.config, self.where, self.family = config, where, family
        self.problems: list[Problem] = []

    def wrong(self, message: str) -> None:
        self.problems.append(Problem(self.where, message))

    def refuse(self, key: str, value: Any, remedy: str) -> None:
        self.wrong(f"{key} = {value!r} is not supported for {self.family}: {remedy}")

    def sizes(self, names: Mapping[str, str]) -> dict[str, int]:
        """{field: value} of {field: key}, each a positive number that the file must have."""
        found = {field: self.config.get(key) for field, key in names.items()}
        for field, value in found.items():
            if value is None:
                self.wrong(f"{names[field]} is missing")
            elif not isinstance(value, int) or value < 1:
                self.wrong(f"{names[field]} is {value!r}, not a size")
        return found

    def only(self, values: Mapping[str, Any]) -> None:
        """Keys that may have one value; one that is missing or null has it too."""
        for key, value in values.items():
            if self.config.get(key) not in (None, value):
                self.refuse(key, self.config[key], f"only {value!r} is")

    def known(self, keys: Collection[str]) -> None:
        """Refuses what is set and neither in `keys` nor without effect."""
        for key in sorted(self.config.keys() - WITHOUT_EFFECT - set(keys)):
            if self.config[key] and not key.startswith("_"):
                self.refuse(key, self.config[key], "it is not known; remove it if the model does not depend on it")

    def dtype(self, default: str = "float32") -> str:
        """Of the weights."""
        named = self.config.get("dtype") or self.config.get("torch_dtype") or default
        dtype = str(named).removeprefix("torch.")
        if dtype not in DTYPES:
            self.refuse("dtype", dtype, f"use {', '.join(DTYPES)}")
        return dtype

    def heads(self, heads: int, groups: int) -> None:
        """Checks that key-value heads share the query heads evenly."""
        if heads % groups:
            self.wrong(f"{heads} attention heads do not divide by {groups} key-value heads")

    def rope(self, default: Mapping[str, Any], base: float, head_dim: int) -> dict[str, Any]:
        """Rotary settings with rope_type and rope_theta. `default` is what transformers takes where a file has none.

        transformers 5 nests them, older files have rope_theta and rope_scaling beside the others.
        """
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or default
        found = {key: value for key, value in found.items() if value is not None}
        found.setdefault("rope_type", found.pop("type", "default"))
        found.setdefault("rope_theta", self.config.get("rope_theta") or base)
        if head_dim % 2:
            self.wrong(f"head size {head_dim} is odd: rotary positions need an even one")
        partial = found.pop("partial_rotary_factor", self.config.get("partial_rotary_factor") or 1.0)
        if float(partial) != 1.0:
            self.refuse("partial_rotary_factor", partial, "use 1.0")
        return found


ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
