"""Which model families there are, by the model types that config.json names. One folder each, with the same files:

    config.py           no torch in it
        read(config.json) -> Dims or problems       hf_config(Dims) -> config.json      shape(Dims) -> ModelShape
        small(...) -> config.json of a random model      WITHOUT_EFFECT: keys that its function does not depend on
        with_mxfp4(Dims) -> (Dims, why not)     of families whose checkpoints may have MXFP4 experts
    spec.py
        transformer_config(...)
        build(Dims, plan, dtype, parts, virtual_stage, options) -> mcore model: `dtype` is that of the parameters,
        `parts` say whose layers they are (parallel/parts.py), `options` are fields of TransformerConfig
        (training/options.py)
    weight_layout.py
        rules(Dims, names) -> name and layout of each weight, for both directions; `names` are those of the checkpoint
        at hand, for families that are stored in several spellings (MODULE_NAMES picks that of transformers' modules)
        is_redundant(name, Dims) -> whether a file may carry that tensor besides
    __init__.py         empty

A model of GPT's form with RMSNorm is no family of its own but a line in KINDS of qwen2/kinds.py.

What they share: config_reading.py (read a config.json), config_meaning.py (compare two), decoder_spec.py (mcore's
layers), layouts.py (how weights are laid out).
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake, nearest
from megatron_ext.models.config_meaning import lost
from megatron_ext.models.qwen2.kinds import KINDS
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan

MODEL_TYPES = {  # of config.json: the family's folder
    **dict.fromkeys(KINDS, "qwen2"),
    "gpt_oss": "gpt_oss",
    "nemotron_h": "nemotron_h",
    "nanochat": "nanochat",
}


@dataclass(frozen=True)
class Family:
    """The three files of one family; spec and weight_layout import torch and are loaded at first use."""

    name: str

    def _part(self, part: str) -> ModuleType:
        return importlib.import_module(f"megatron_ext.models.{self.name}.{part}")

    @property
    def config(self) -> ModuleType:
        return self._part("config")

    @property
    def spec(self) -> ModuleType:
        return self._part("spec")

    def build(
        self, dims: Any, plan: ParallelPlan, dtype: Any, parts: Parts = OURS, options: Mapping[str, Any] = {}
    ) -> list[Any]:
        """Build this rank's parts of the model in model order, one or `plan.virtual`; their weights are not set.

        All of it is on the rank's device, whatever device a layer made its parameters on.
        """
        from megatron_ext.device import device

        virtual = range(plan.virtual) if plan.virtual > 1 else [None]
        return [
            self.spec.build(dims, plan, dtype=dtype, parts=parts, virtual_stage=stage, options=options).to(device())
            for stage in virtual
        ]

    @property
    def mapping(self) -> ModuleType:
        """The module weight_layout.py: which Hugging Face tensors each weight is made of, and how."""
        return self._part("weight_layout")


def model_type(family: Family, dims: Any) -> str:
    """Return what config.json calls a model: of a family of several kinds, such as Qwen2's, which one it is."""
    return getattr(dims, "kind", family.name)


def unwrap(model: Any) -> Any:
    """Return the family's model below DistributedDataParallel and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model


def stages(model: Any) -> list[Any]:
    """Return this rank's parts of the model in model order, unwrapped: one, or those of an interleaved pipeline."""
    return [unwrap(part) for part in (model if isinstance(model, list) else [model])]


def read_config(folder: Path) -> tuple[Family | None, Any, list[Problem]]:
    """Read family and dimensions of the Hugging Face config.json in `folder`, or the problems with it. No torch."""
    path = Path(folder) / "config.json"
    try:
        file = inside(folder, path.name, needed=False)
        if file is None:
            return None, None, [Problem(str(path), "no such file: a Hugging Face model folder has one")]
        config = durable.read_json(file)
    except UserMistake as mistake:
        return None, None, mistake.problems
    except OSError as error:
        return None, None, [Problem(str(path), f"cannot be read ({error.strerror})")]
    except durable.TornFile as torn:
        return None, None, [Problem(str(path), str(torn).removeprefix(f"{file} "))]
    return parse_config(config, str(path))


def _is_beyond(value: Any) -> bool:
    """Return whether a value of JSON is, or holds, a whole number that neither an index nor a float could take."""
    if isinstance(value, (dict, list)):
        return any(map(_is_beyond, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def parse_config(config: Any, where: str) -> tuple[Family | None, Any, list[Problem]]:
    """Read family and dimensions of a parsed config.json that will lie at `where`, or the problems with it."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        return None, None, [Problem(where, f"model_type {kind!r} is not known" + nearest(str(kind), list(MODEL_TYPES)))]
    family = Family(MODEL_TYPES[kind])
    if beyond := [key for key, value in config.items() if _is_beyond(value)]:
        return family, None, [Problem(where, f"{key} has a whole number that 64 bits do not hold") for key in beyond]
    dims, problems = family.config.read(config, where)
    if dims is not None and (problems := [Problem(where, message) for message in lost(config, family, dims)]):
        dims = None
    return family, dims, problems
