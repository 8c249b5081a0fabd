"""nanochat's own checkpoints: FOLDER/TAG/model_STEP.pt beside meta_STEP.json (nanochat/checkpoint_manager.py).

They are read as the tensors of a NanoChatForCausalLM, and written from them. Versions from January 2026 on add value
embeddings, residual scales and sharper attention: what NanoChatForCausalLM does not have is refused by name. What only
nanochat has (the meta file, the rows that pad the vocabulary) goes along as ORIGIN. No torch at the top.
"""

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base import bounds, durable
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
VOCABULARY = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
ORIGIN = "nanochat.json"  # among the Hugging Face files of a model folder
PADDED_TO = 64  # rows of the vocabulary, where the model never had any (nanochat/gpt.py since December 2025)
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
LISTED = 8  # wrong tensors that a message names
_MODEL = re.compile(r"model_(\d{6,})\.pt")  # nanochat reads no other, such as a copy model_best.pt
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
    steps = sorted(int(name[1]) for path in place.glob("model_*.pt") if (name := _MODEL.fullmatch(path.name)))
    if not steps:
        message = f"{tag!r} has no model_STEP.pt, of six digits or more, in {folder}; there are {', '.join(tags)}"
        raise UserMistake(Problem("model_tag", message))
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
        sizes = [_whole(key, model.pop(key)) for key in SIZES]
    except (OSError, durable.TornFile, KeyError, TypeError, ValueError) as error:
        raise UserMistake(Problem(str(meta), f"has no model_config with {', '.join(SIZES)} ({error!r})")) from None
    if set(str(pattern := model.pop("window_pattern", "L")).upper()) != {"L"}:
        message = f"window_pattern {pattern!r} is not L alone: NanoChatForCausalLM has no short windows"
        raise UserMistake(Problem(str(meta), message))
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


def _whole(key: str, value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{key} is {value!r}, no whole number")
    return value


def hf_name(name: str) -> str:
    """Return NanoChatForCausalLM's name of nanochat's tensor; unknown ones keep theirs."""
    name = name.removeprefix("_orig_mod.")  # torch.compile's
    if block := _BLOCK.match(name):
        return f"model.layers.{block[1]}.{NAMES.get(block[2], block[2])}.weight"
    return VOCABULARY.get(name, name)


def own_name(name: str) -> str:
    """Return nanochat's name of NanoChatForCausalLM's tensor."""
    layer, _, module = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    own = {theirs: ours for ours, theirs in NAMES.items()}
    if name.startswith("model.layers.") and module in own:
        return f"transformer.h.{layer}.{own[module]}.weight"
    return {theirs: ours for ours, theirs in VOCABULARY.items()}[name]


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
        return data[: self._vocabulary] if name in VOCABULARY.values() and data.dim() else data

    def padding(self) -> dict[str, "torch.Tensor"]:
        """Return the rows that `read` leaves out, by nanochat's names."""
        return {own: self._tensors[name][self._vocabulary :] for own, name in VOCABULARY.items()}


# ---------------------------------------------------------------- the way back


def keep_origin(hf: Path, meta: Path, tensors: NanochatTensors, weights_digest: str) -> None:
    """Write ORIGIN among a model folder's Hugging Face files: what else the checkpoint says, for an export.

    `weights_digest` is that of the model folder; it tells whether the weights are still these.
    """
    import torch

    padding = {
        name: {
            "dtype": str(rows.dtype).removeprefix("torch."),
            "rows": len(rows),
            "data": base64.b64encode(rows.contiguous().view(torch.uint8).numpy().tobytes()).decode(),
        }
        for name, rows in tensors.padding().items()
    }
    text = bounds.read_text(inside(meta.parent, meta.name), bounds.JSON)
    step = int(meta.stem.removeprefix("meta_"))
    durable.write_json(hf / ORIGIN, {"step": step, "meta": text, "weights_digest": weights_digest, "padding": padding})


def unlike(dims: Dims, where: str) -> list[Problem]:
    """Return what of a model nanochat's own code has no setting for."""
    of_nanochat = {
        "tie_word_embeddings": (dims.tied, False), "intermediate_size": (dims.ffn, 4 * dims.hidden),
        "final_logit_softcapping": (dims.logit_cap, LOGIT_CAP), "rope_theta": (dims.rope_base, 10000.0),
        "rms_norm_eps": (dims.norm_epsilon, 1e-6),
    }  # fmt: skip
    return [
        Problem(where, f"{key} is {value}, and nanochat's models have {own}: export_hf keeps it")
        for key, (value, own) in of_nanochat.items()
        if value != own
    ]


def write(
    hf: Path, place: Path, dims: Dims, tensors: dict[str, "torch.Tensor"], step: int, weights_digest: str
) -> tuple[int, bool]:
    """Write model_STEP.pt and meta_STEP.json into the folder `place`; return (step, whether meta is the origin's).

    `hf` has the model's Hugging Face files, `tensors` its weights by their names there. A `step` of -1 is that of the
    checkpoint which the model was imported from, where the weights are still its own. Then meta is as it was. Of a
    trained model it keeps what describes the model, and nothing that was measured.
    """
    import torch

    sizes = (dims.max_positions, dims.vocabulary, dims.layers, dims.heads, dims.kv_groups, dims.hidden)
    own = dict(zip(SIZES, sizes))
    named = {own_name(name): tensor for name, tensor in tensors.items()}
    origin: dict[str, Any] = {
        "step": -1,
        "meta": json.dumps({"model_config": own}),
        "weights_digest": "",
        "padding": {},
    }
    try:
        if path := inside(hf, ORIGIN, needed=False):
            origin = durable.read_json(path)
        meta = json.loads(origin["meta"])
        config = meta["model_config"]
        if wrong := [f"{name} {config[name]}" for name in SIZES if int(config[name]) != own[name]]:
            raise UserMistake(Problem(str(hf / ORIGIN), f"{', '.join(wrong)} is not what config.json says: {own}"))
        for name in VOCABULARY:
            named[name] = torch.cat([named[name], _padding(origin["padding"].get(name), named[name])])
        same = origin["weights_digest"] == weights_digest and step in (-1, origin["step"])
        step = origin["step"] if same else max(step, 0)
        number = f"{step:06d}"
    except (durable.TornFile, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = f"is not what import_hf wrote of a checkpoint of nanochat ({error!r}): import it again"
        raise UserMistake(Problem(str(hf / ORIGIN), said)) from None
    text = origin["meta"]
    if not same:
        kept = {"user_config": meta["user_config"]} if "user_config" in meta else {}
        trained = {"weights_digest": weights_digest, "from_step": origin["step"] if path else None}
        text = json.dumps({"step": step, "model_config": config, **kept, "afterok": trained}, indent=2)
    place.mkdir(parents=True)
    torch.save(named, place / f"model_{number}.pt")
    durable.write_file(place / f"meta_{number}.json", text)
    return step, same


def _padding(kept: dict[str, Any] | None, rows: "torch.Tensor") -> "torch.Tensor":
    """Return the rows [.., hidden] that follow the vocabulary's: those that were kept, or as many zeros as are due."""
    import torch

    if kept is None:
        return rows.new_zeros(-len(rows) % PADDED_TO, rows.size(1))
    data = bytearray(base64.b64decode(kept["data"]))
    if not data:
        return rows.new_empty(0, rows.size(1))
    found = torch.frombuffer(data, dtype=torch.uint8).view(getattr(torch, kept["dtype"]))
    return found.reshape(kept["rows"], rows.size(1)).to(rows.dtype)
