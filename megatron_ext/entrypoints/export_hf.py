"""A model folder as a Hugging Face checkpoint that transformers loads and that gives the same logits.

A model with an adapter comes merged, or as the adapter alone in PEFT's format, for the base model. The experts of
gpt-oss can come as MXFP4 (`quantization`), which is rounded: the facts say by how much.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base import durable
from data_tools.base.declared import MODELS, setting
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.registry import Family, parse_config
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.settings import DTYPES
from megatron_ext.preflight import facts

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.models.layouts import Rule

ADAPTERS = ("merged", "peft")
QUANTIZATIONS = ("", "mxfp4")


@dataclass
class Config:
    """The config of the phase export_hf."""

    model: str = setting("", "model folder", example="${phases.imported.out}", needed=True, input=True, made_by=MODELS)
    dtype: str = setting("", 'type of the weights in the files; "" keeps that of the folder', choices=("", *DTYPES))
    adapter: str = setting(
        "merged", "how a model's adapter is written: into the weights, or alone in PEFT's format", choices=ADAPTERS
    )
    quantization: str = setting(
        "", 'format of the experts\' matrices: mxfp4, or "" for `dtype`', choices=QUANTIZATIONS, keyed="if_set"
    )


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of folders that are yet to come."""
    site = site or Site(ranks)
    problems = _check_peft(config, *facts.model_adapter(config.model, site)) + _check_quantization(config, site)
    if ranks != 1:
        problems.append(Problem("", f"export_hf runs on 1 rank, not {ranks}"))
    return problems


def _check_peft(config: Config, known: bool, lora: LoraConfig | None) -> list[Problem]:
    """Refuse an adapter that PEFT cannot have, where it is known."""
    if config.adapter != "peft" or not known:
        return []
    if lora is None:
        return [Problem("adapter", f"{config.model} has none for peft: use merged, which exports the whole model")]
    return [Problem("adapter", f"{why}: use merged") for why in loras.not_for_peft(lora)]


def _check_quantization(config: Config, site: Site) -> list[Problem]:
    """Refuse a format that the model's experts cannot have, where the model is known."""
    if not config.quantization:
        return []
    if config.adapter == "peft":
        return [Problem("quantization", "an adapter alone has no experts to quantise: leave it out, or use merged")]
    file, where = facts.model_config(config.model, site)
    family, dims, _ = parse_config(file, where) if file is not None else (None, None, [])
    if family is None or dims is None:
        return []  # not known yet, or refused elsewhere
    said = _quantised(family, dims)[1]
    return [Problem("quantization", f"{said}: leave it out")] if said else []


def _quantised(family: Family, dims: Any) -> tuple[Any, str]:
    """Return the dimensions of the model whose checkpoint has MXFP4 experts, and why there is none such."""
    if not hasattr(family.config, "with_mxfp4"):
        return dims, f"{family.name} models have no MXFP4 checkpoints"
    return family.config.with_mxfp4(dims)


def _rules(config: Config, folder: "ModelFolder", names: Collection[str]) -> list["Rule"]:
    """Return the rules of the files that are written."""
    dims = _quantised(folder.family, folder.dims)[0] if config.quantization else folder.dims
    return folder.family.mapping.rules(dims, names)


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Export the model in this process, and return the facts of `finish`."""
    share(config, out, progress)
    return finish(config, [out], out)


def share(config: Config, out: Path, progress: Progress = silent, index: int = 0, count: int = 1) -> int:
    """Write every `count`-th file, for `finish`. Return how many these are."""
    from megatron_ext.model_folders import model_folder
    from megatron_ext.weights import convert

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    if config.adapter == "peft":
        return 0  # all at once, in `finish`
    from megatron_ext.model_folders import merge

    base = convert.base_ledger(folder.hf)
    convert.export_share(
        folder.weights,
        _rules(config, folder, base["hf"]),
        base,
        out,
        dtype=config.dtype,
        index=index,
        count=count,
        progress=progress,
        changes=merge.changes(folder),
    )
    return len(list(out.glob("*.safetensors")))


def finish(config: Config, parts: list[Path], out: Path) -> dict[str, Any]:
    """Join all shares to one folder. Return the facts: weights_digest of the model, bytes of each weight file, dtype,
    dtype_changes; with `quantization` also quantized: rounded.summary."""
    from megatron_ext.model_folders import merge, model_folder
    from megatron_ext.weights import convert, rounded

    folder = model_folder.open_folder(config.model)
    dtype = config.dtype or folder.dtype
    if config.adapter == "peft":
        merge.export_adapter(folder, out, dtype)
        return {"weights_digest": folder.weights_digest, "dtype": dtype, "dtype_changes": {}, "bytes": _bytes(out)}
    model_folder.copy_hf_files(folder.hf, out)
    ledger = convert.finish_export(parts, out, {"family": folder.family.name, "source": config.model})
    if ledger["weights_digest"] != folder.base_digest:
        raise UserMistake(
            Problem(
                str(folder.path),
                f"its weights have digest {ledger['weights_digest'][:12]}…, model.json says "
                f"{folder.base_digest[:12]}…: they were changed; make the folder again",
            )
        )
    # What transformers loads them as: of a base checkpoint whose config.json said otherwise, too.
    dtype = convert.main_dtype(convert.dtypes_of(ledger), _rules(config, folder, ledger["hf"]))
    file = durable.read_json(out / "config.json")
    for key in ("dtype", "torch_dtype"):
        if key in file or key == "dtype":
            file[key] = dtype
    if config.quantization:
        file |= {"quantization_config": folder.family.config.MXFP4}
    durable.write_json(out / "config.json", file)
    return {
        "weights_digest": folder.weights_digest,
        "dtype": dtype,
        "dtype_changes": ledger["dtype_changes"],
        "bytes": _bytes(out),
        **({"quantized": rounded.summary(ledger)} if config.quantization else {}),
    }


def _bytes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(out.glob("*.safetensors"))}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
