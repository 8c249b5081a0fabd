"""nanochat's own checkpoints: FOLDER/TAG/model_STEP.pt beside meta_STEP.json (nanochat/checkpoint_manager.py).

They are read as the tensors of a NanoChatForCausalLM. Versions from January 2026 on add value embeddings, residual
scales and sharper attention: what NanoChatForCausalLM does not have is refused by name. No torch at the top.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.models.nanochat.config import LOGIT_CAP, Dims, hf_config

if TYPE_CHECKING:
    import torch

    from megatron_ext.models.layouts import HfTensor

NAMES = {  # of a block's tensors
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
LISTED = 8  # wrong tensors that a message names
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)\.weight$")


def find(folder: Path, tag: str, step: int) -> tuple[Path, Path] | None:
    """Return (model file, meta file) of the step (-1: the last) in FOLDER/TAG; None where FOLDER holds no such
    checkpoints.

    UserMistake where it does, but not the tag or the step.
    """
    tags = sorted({path.parent.name for path in folder.glob("*/model_*.pt")})
    if not tag and not any(folder.glob("model_*.pt")):
        if tags:
            raise UserMistake(Problem("model_tag", f"is missing: {folder} has {', '.join(tags)}"))
        return None
    place = folder / tag
    steps = sorted(int(path.stem.removeprefix("model_")) for path in place.glob("model_*.pt"))
    if not steps:
        raise UserMistake(Problem("model_tag", f"{tag!r} has no model_*.pt in {folder}; there are {', '.join(tags)}"))
    if step >= 0 and step not in steps:
        raise UserMistake(Problem("step", f"{place} has no step {step}; there are {', '.join(map(str, steps))}"))
    number = f"{steps[-1] if step < 0 else step:06d}"
    return place / f"model_{number}.pt", place / f"meta_{number}.json"


def config_of(meta: Path, dtype: str) -> dict[str, Any]:
    """Return config.json of the NanoChatForCausalLM that meta_STEP.json describes. Raises UserMistake for what it
    cannot express.
    """
    try:
        model = dict(durable.read_json(inside(meta.parent, meta.name))["model_config"])
        sizes = [int(model.pop(key)) for key in SIZES]
    except (OSError, durable.TornFile, KeyError, TypeError, ValueError) as error:
        raise UserMistake(Problem(str(meta), f"has no model_config with {', '.join(SIZES)} ({error!r})")) from None
    if set(model.pop("window_pattern", "L")) != {"L"}:
        raise UserMistake(Problem(str(meta), "window_pattern has short windows: NanoChatForCausalLM has none"))
    if model:
        raise UserMistake(Problem(str(meta), f"model_config has {', '.join(model)}, which is not known"))
    positions, vocabulary, layers, heads, groups, hidden = sizes
    return hf_config(
        Dims(
            layers=layers,
            hidden=hidden,
            ffn=4 * hidden,
            heads=heads,
            kv_groups=groups,
            vocabulary=vocabulary,
            tied=False,
            norm_epsilon=1e-6,  # transformers' for these models; nanochat takes that of the number format
            rope_base=10000.0,
            max_positions=positions,
            logit_cap=LOGIT_CAP,
            dtype=dtype,
        )
    )


def hf_name(name: str) -> str:
    """Return NanoChatForCausalLM's name of nanochat's tensor; unknown ones keep theirs."""
    name = name.removeprefix("_orig_mod.")  # torch.compile's
    if block := _BLOCK.match(name):
        return f"model.layers.{block[1]}.{NAMES.get(block[2], block[2])}.weight"
    return "model.embed_tokens.weight" if name == "transformer.wte.weight" else name


class NanochatTensors:
    """The tensors of a model_STEP.pt under transformers' names; what hf_files.HfTensors is to safetensors."""

    def __init__(self, path: Path, vocabulary: int):
        """Read the file; raises UserMistake when it is unreadable. Rows from `vocabulary` on are padding."""
        from megatron_ext.files import pickles

        self._file, self._vocabulary = path, vocabulary
        try:
            loaded = pickles.load(inside(path.parent, path.name))
        except (OSError, pickles.Refused) as error:
            raise UserMistake(Problem(str(path), f"not a whole PyTorch checkpoint ({error})")) from None
        if not isinstance(loaded, dict) or not all(type(name) is str for name in loaded):
            raise UserMistake(Problem(str(path), "is no checkpoint of nanochat: it is no dict of tensors by name"))
        odd = [name for name, value in loaded.items() if not hasattr(value, "untyped_storage")]
        if odd:
            raise UserMistake([Problem(str(path), f"{name} is no tensor") for name in odd[:LISTED]])
        self._tensors = {hf_name(name): tensor for name, tensor in loaded.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.read(name).shape) for name in self._tensors}

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def file(self, name: str) -> str:
        return self._file.name

    def read(self, tensor: "HfTensor") -> "torch.Tensor":
        name = tensor if isinstance(tensor, str) else tensor.name
        data = self._tensors[name]
        padded = name in ("model.embed_tokens.weight", "lm_head.weight") and data.dim()
        return data[: self._vocabulary] if padded else data
