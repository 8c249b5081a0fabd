"""A model folder as a distributed checkpoint (`torch_dist`) that Megatron-LM loads, a release without optimizer state.

    OUT/latest_checkpointed_iteration.txt    "release"
    OUT/release/                             the weights, common.pt with the arguments of such a model
    OUT/arguments.txt                        the words of Megatron-LM's command line that load it

Megatron-LM asks for tensors by what the checkpoint says of itself (`content_metadata`): that each layer has its own. In
log_all it leaves out the `_extra_state`s, of FP8 for the most part, that its layers ask for and no weights have.
tests/megatron_ext/test_megatron_dist.py runs megatron-core's model and loader, and under soak Megatron-LM itself.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base.declared import MODELS, setting
from data_tools.base.digests import DIGESTS
from data_tools.base.inside import files
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.models.rotary import Linear, Yarn
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import facts
from megatron_ext.weights.megatron_arguments import LLAMA3_FACTOR

RELEASE = "release"
WORDS = "arguments.txt"
STOCK = (
    "qwen2",
    "qwen3",
    "llama",
    "qwen3_moe",
    "mixtral",
    "qwen2_moe",
)  # that Megatron-LM's arguments were shown to say
CONTENT = {"non_homogeneous_layers": True}  # of a checkpoint: each layer has tensors of its own


@dataclass
class Config:
    """The config of the phase export_megatron."""

    model: str = setting(
        "", "model folder; an adapter is merged by merge_lora first", example="${phases.sft.out}", needed=True,
        input=True, made_by=MODELS,
    )  # fmt: skip


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of folders that are yet to come."""
    from megatron_ext.models.registry import model_type, parse_config

    problems = []
    if ranks != 1:
        problems.append(Problem("", f"export_megatron runs on 1 rank, not {ranks}"))
    site = site or Site(ranks)
    if facts.model_adapter(config.model, site)[1]:
        problems.append(Problem("model", f"{config.model} has an adapter beside its base: merge it with merge_lora"))
    known, where = facts.model_config(config.model, site)
    if known is not None:
        family, dims, wrong = parse_config(known, where)
        problems += wrong or _not_stock(model_type(family, dims) if family else "", dims, where)
    return problems


def _not_stock(kind: str, dims: Any, where: str) -> list[Problem]:
    """Return a problem where Megatron-LM would build another model of its arguments, or none was ever shown."""
    known = f"only {', '.join(STOCK)} without these were shown to be what Megatron-LM builds of its arguments"
    if kind not in STOCK:
        what, known = f"is a {kind}", known.replace(" without these", "")
    elif isinstance(dims.stretch, (Yarn, Linear)):
        what = f"has {type(dims.stretch).__name__} positions"
    elif any(dims.sliding):
        what = "has sliding windows"
    elif dims.rope_factor not in (0, LLAMA3_FACTOR):
        what = f"has llama3 positions of factor {dims.rope_factor:g}"
        known = f"Megatron-LM's builder leaves --rope-scaling-factor out: its model would have {LLAMA3_FACTOR:g}"
    else:
        return []
    return [Problem("model", f"{where} {what}, and {known}: use export_hf")]


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the checkpoint.

    Return the facts: weights_digest of the model, bytes, tensors, path, dtype, arguments (for Megatron-LM, beside
    --load).
    """
    import torch

    from megatron_ext.model_folders import model_folder
    from megatron_ext.weights import dist_weights, megatron_arguments

    if problems := check(config, 1):
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    reader = dist_weights.Reader(folder.weights)  # which also shows that it is whole
    release = out / RELEASE
    release.mkdir()
    own = (dist_weights.COMMON, DIGESTS)  # copies are not the bytes that their writers synced
    copied = [path for path in files(folder.weights) if path.name not in own]
    for done, path in enumerate(copied):
        progress(done, len(copied), "files")
        shutil.copyfile(path, release / path.relative_to(folder.weights))
    state = {
        "args": megatron_arguments.arguments_of(folder.dims, folder.shape),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": CONTENT,
    }
    torch.save(state, release / dist_weights.COMMON)
    (out / "latest_checkpointed_iteration.txt").write_text(RELEASE)
    words = megatron_arguments.command_line(folder.dims, folder.shape)
    (out / WORDS).write_text(f"{' '.join(words)}\n")
    return {
        "weights_digest": folder.weights_digest,
        "bytes": sum(path.stat().st_size for path in release.iterdir()),
        "tensors": len(reader.stored.tensors),
        "path": RELEASE,
        "dtype": folder.dtype,
        "arguments": words,
    }


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
