"""A model folder with an adapter -> the plain model folder that computes the same."""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.base.declared import MODELS, setting
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import facts


@dataclass
class Config:
    """The config of the phase merge_lora."""

    model: str = setting(
        "",
        "a model folder that sft or grpo made with lora",
        example="${phases.sft.out}",
        needed=True,
        input=True,
        made_by=MODELS,
    )


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of folders that are yet to come."""
    problems = []
    known, adapter = facts.model_adapter(config.model, site or Site(ranks))
    if known and adapter is None:
        problems.append(Problem("model", f"{config.model} has no adapter: it can be used as it is"))
    if ranks != 1:
        problems.append(Problem("", f"merge_lora runs on 1 rank, not {ranks}: as an array it shares the tensors"))
    return problems


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Merge the model in this process, and return the facts of `finish`."""
    share(config, out, progress)
    return finish(config, [out], out)


def share(config: Config, out: Path, progress: Progress = silent, index: int = 0, count: int = 1) -> int:
    """Merge every `count`-th tensor, for `finish`. Return how many these are."""
    from megatron_ext.model_folders import merge
    from megatron_ext.model_folders.model_folder import open_folder

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    return merge.share(open_folder(config.model), out, index, count, progress=progress)


def finish(config: Config, parts: list[Path], out: Path) -> dict[str, Any]:
    """Join all shares to one model folder. Return the facts: weights_digest, base_digest, lora (its settings)."""
    from megatron_ext.model_folders import merge
    from megatron_ext.model_folders.model_folder import open_folder

    folder = open_folder(config.model)
    digest = merge.finish(folder, parts, out)
    lora = asdict(folder.lora) if folder.lora else {}
    return {"weights_digest": digest, "base_digest": folder.base_digest, "lora": lora}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
