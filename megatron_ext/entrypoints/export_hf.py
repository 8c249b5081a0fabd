"""A model folder as a Hugging Face checkpoint that transformers loads and that gives the same logits.

A model with an adapter comes merged, or as the adapter alone in PEFT's format, for the base model.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.declared import setting
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.settings import DTYPES
from megatron_ext.preflight import facts

ADAPTERS = ("merged", "peft")


@dataclass
class Config:
    """The config of the phase export_hf."""

    model: str = setting("", "model folder", needed=True, input=True)
    dtype: str = setting("", 'type of the weights in the files; "" keeps that of the folder', choices=("", *DTYPES))
    adapter: str = setting(
        "merged", "how a model's adapter is written: into the weights, or alone in PEFT's format", choices=ADAPTERS
    )


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of folders that are yet to come."""
    problems = _check_peft(config, *facts.model_adapter(config.model, site or Site(ranks)))
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
    rules = folder.family.mapping.rules(folder.dims, base["hf"])
    convert.export_share(
        folder.weights,
        rules,
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
    dtype_changes."""
    from megatron_ext.model_folders import merge, model_folder
    from megatron_ext.weights import convert

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
    rules = folder.family.mapping.rules(folder.dims, ledger["hf"])
    dtype = convert.main_dtype(convert.dtypes_of(ledger), rules)
    file = durable.read_json(out / "config.json")
    for key in ("dtype", "torch_dtype"):
        if key in file or key == "dtype":
            file[key] = dtype
    durable.write_json(out / "config.json", file)
    return {
        "weights_digest": folder.weights_digest,
        "dtype": dtype,
        "dtype_changes": ledger["dtype_changes"],
        "bytes": _bytes(out),
    }


def _bytes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(out.glob("*.safetensors"))}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
