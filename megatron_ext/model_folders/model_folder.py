"""A model folder: the unit that phases pass to each other.

    model.json    family, format, step, weights digest, dtype, what config.json means (models/config_meaning.py)
    hf/           config.json, generation_config.json, tokenizer files: all but the weights of a Hugging Face folder
    weights/      distributed checkpoint, weights only; any parallel layout loads it
    adapter/      of a model trained with LoRA, in PEFT's format; weights/ are those of its base then

Whoever loads a folder with an adapter gets the model with it in place. Reading model.json and hf/ needs no torch; the
functions that load and write do.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import expanded, files, inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.files import step_manifest
from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.config_meaning import differences, meaning
from megatron_ext.models.registry import Family, read_config
from megatron_ext.parallel import rules
from megatron_ext.parallel.machine import here
from megatron_ext.parallel.parts import AUTO, Choice, choose
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.parallel.shape import ModelShape

FORMAT = 1
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # rows a layout may add to
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf",
                "adapter_config.json")  # an adapter is no part of the base model that it lies beside  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A readable model folder."""

    path: Path
    family: Family
    dims: Any  # the family's Dims
    step: int
    weights_digest: str
    dtype: str
    lora: LoraConfig | None = None  # of its adapter
    base_digest: str = ""  # of weights/ alone

    @property
    def shape(self) -> ModelShape:
        return self.family.config.shape(self.dims)

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"


def open_folder(path: str | Path) -> ModelFolder:
    """Open the model folder at `path`. Raises UserMistake when it is none, or of another format, or not understood, or
    when its config.json has come to mean something else. No torch.
    """
    path = Path(path)
    try:
        facts = durable.read_json(inside(path, "model.json"))
    except (OSError, ValueError, UserMistake) as error:
        raise UserMistake(Problem(str(path), f"not a model folder ({error}); import_hf makes one")) from None
    if facts.get("format") != FORMAT:
        raise UserMistake(
            Problem(str(path / "model.json"), f"format {facts.get('format')!r} is unknown, this version reads {FORMAT}")
        )
    family, dims, problems = read_config(path / "hf")
    if problems or family is None:
        raise UserMistake(problems)
    now = meaning(family, dims)
    if changed := differences(now, facts.get("config", now)):
        said = f"{'; '.join(changed)} as when the folder was made: put it back, or make another folder with import_hf"
        raise UserMistake(Problem(str(path / "hf" / "config.json"), said))
    adapted = facts.get("adapter")
    return ModelFolder(
        path,
        family,
        dims=dims,
        step=facts["step"],
        weights_digest=facts["weights_digest"],
        dtype=facts["dtype"],
        lora=LoraConfig(**adapted["lora"]) if adapted else None,
        base_digest=adapted["base_digest"] if adapted else facts["weights_digest"],
    )


def weights_at(path: str | Path, step: int = 0) -> tuple[Path, str]:
    """Return (distributed checkpoint, weights digest) of a model folder, of one published step, or of a training's
    folder: its checkpoint `step`, or with 0 what it sealed, else the newest. Raises UserMistake where there is none
    such. No torch.
    """
    path = expanded(path)
    if step == 0:
        for name, weights in (("model.json", "weights"), (step_manifest.MANIFEST, "state")):
            if (path / name).is_file():
                if name == step_manifest.MANIFEST:
                    facts = step_manifest.read_or_refuse(path, "init_from")
                else:
                    facts = durable.read_json(inside(path, name))
                if facts.get("adapter"):
                    said = f"{path} is a model with an adapter: merge it first (merge_lora)"
                    raise UserMistake(Problem("init_from", said))
                return path / weights, facts["weights_digest"]
    # A sealed folder is RUN/PHASE/KEY/work/NAME, and checkpoints lie in KEY (jobs/artifacts/layout.py).
    roots = [root / "checkpoints" for root in (path, path.parent.parent) if (root / "checkpoints").is_dir()]
    steps = sorted(
        int(published.name.removeprefix("step_"))
        for root in roots[:1]
        for published in root.glob("step_*")
        if (published / "manifest.json").is_file()
    )
    if not steps:
        raise UserMistake(Problem("init_from", f"{path} is no model folder, and has no checkpoints either"))
    if step and step not in steps:
        raise UserMistake(Problem("init_step", f"{roots[0]} has no step {step}: it has {', '.join(map(str, steps))}"))
    return weights_at(roots[0] / f"step_{step or steps[-1]}")


def files_beside_weights(source: Path) -> dict[str, Path]:
    """Name -> path of every file of a Hugging Face folder but weights. UserMistake naming all that lead out of it."""
    weights = {path.name for pattern in WEIGHT_FILES for path in source.glob(pattern)}
    files, problems = {}, []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in weights and not path.name.startswith("."):
            try:
                files[path.name] = inside(source, path.name)
            except UserMistake as mistake:
                problems += mistake.problems
    if problems:
        raise UserMistake(problems)
    return files


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy everything of a Hugging Face folder but weights and sub-folders.

    Weights go on unquantised, and config.json says so.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, path in files_beside_weights(source).items():
        shutil.copyfile(path, target / name)
    config = target / "config.json"
    if config.is_file() and "quantization_config" in (file := durable.read_json(config)):
        del file["quantization_config"]
        durable.write_json(config, file)


def check_same_model(folder: ModelFolder, weights: Path) -> None:
    """Raise UserMistake where the distributed checkpoint `weights` does not hold the tensors of the folder's model, or
    is of a model folder that means another function by them (other rotary positions, epsilons, windows). mcore would
    cut another vocabulary to size without a word: it takes the rows for padding.
    """
    from megatron_ext.weights.dist_weights import Reader

    def shapes(path: Path) -> dict[str, tuple[int, ...]]:
        stored = {key: shape for key, (_, shape) in Reader(path).tensors().items() if not key.startswith("optimizer.")}
        return {key: shape[1:] if key in PADDED else shape for key, shape in stored.items()}

    own, other = shapes(folder.weights), shapes(weights)
    keys = [key for key in {**own, **other} if own.get(key) != other.get(key)]
    said = [f"{key} is {other.get(key)}, not {own.get(key)}" for key in keys] + _otherwise(folder, weights.parent)
    if said:
        raise UserMistake(Problem("init_from", f"{weights.parent} is not of the model {folder.path}: {said[0]}"))


def _otherwise(folder: ModelFolder, other: Path) -> list[str]:
    """Return what a model folder or a published step says of its model that is not so of `folder`'s."""
    if (other / "model.json").is_file():
        theirs = open_folder(other)
        return differences(meaning(theirs.family, theirs.dims), meaning(folder.family, folder.dims))
    rows, ours = step_manifest.read_or_refuse(other, "init_from").get("vocabulary"), folder.dims.vocabulary
    return [f"its vocabulary has {rows:,} rows, not {ours:,}"] if rows not in (None, ours) else []


def choose_parts(folder: ModelFolder, plan: ParallelPlan, dtype: str, backend: str, base: str = "") -> Choice:
    """Return whose layers the model is made of on this machine, whose ranks are started. Raise UserMistake where
    `backend` has not what the model, the plan or the machine need.
    """
    import torch.distributed as dist

    machine, dtype = here(), dtype or folder.dtype
    asked = Workload(dist.get_world_size(), folder.shape, backend=backend, machine=machine, dtype=dtype, base=base)
    if problems := rules.check_parts(plan, asked):
        raise UserMistake(problems)
    return choose(backend, rules.needs_of(plan, asked))


def told_parts(folder: ModelFolder, config: ModelSettings) -> Choice:
    """Return `choose_parts` of a phase, and have rank 0 write a line for each part to the phase's log."""
    import torch.distributed as dist

    choice = choose_parts(folder, config.parallel, config.dtype, backend=config.backend, base=config.base)
    if dist.get_rank() == 0:
        print(*choice.lines(), sep="\n", file=sys.stderr, flush=True)
    return choice


def load_stages(
    folder: ModelFolder,
    plan: ParallelPlan,
    dtype: str = "",
    backend: str = AUTO,
    options: Mapping[str, Any] = {},
    weights: Path | None = None,
    base: str = "",
) -> list[Any]:
    """Load this rank's parts of the model (registry.stages), weights loaded and the adapter in place. `dtype` "" keeps
    the folder's, `backend` is chosen by part (parallel/parts.py).

    `options`: further fields of TransformerConfig. `weights`: a distributed checkpoint in place of the folder's own.
    `base` "mxfp4" holds the experts as its blocks, for a model of which no more than adapters is trained. Every rank
    takes part.
    """
    import torch

    from megatron_ext.weights import checkpoint

    parts = folder.family.build(
        folder.dims,
        plan,
        dtype=getattr(torch, dtype or folder.dtype),
        parts=choose_parts(folder, plan, dtype, backend=backend, base=base).parts,
        options=options,
    )
    if weights is not None:
        check_same_model(folder, weights)
    checkpoint.load_weights(parts, weights or folder.weights)
    if base:
        from megatron_ext.weights import blocks

        blocks.load(parts, folder.family.mapping.rules(folder.dims), weights or folder.weights)
    if folder.lora:
        from megatron_ext.lora import adapters, pairs, peft_format

        adapters.attach(parts, folder.family, folder.dims, folder.lora)
        adapted = pairs.pairs(folder.family, folder.dims, folder.lora)
        adapters.load(parts, peft_format.Reader(folder.adapter, adapted, folder.lora))
    return parts


def load_trainable(
    folder: ModelFolder,
    plan: ParallelPlan,
    lora: LoraConfig,
    seed: int,
    dtype: str = "",
    backend: str = AUTO,
    options: Mapping[str, Any] = {},
    weights: Path | None = None,
    base: str = "",
) -> list[Any]:
    """Load as `load_stages` does, for training: with LoRA, new adapters from `seed` unless the folder has one to go on
    with.

    UserMistake where the folder's adapter is of another kind than `lora`, which may be off.
    """
    problems = loras.check_folder(lora, folder.lora, str(folder.path))
    if problems:
        raise UserMistake(problems)
    parts = load_stages(folder, plan, dtype=dtype, backend=backend, options=options, weights=weights, base=base)
    if lora.rank and not folder.lora:
        from megatron_ext.lora import adapters

        adapters.attach(parts, folder.family, dims=folder.dims, config=lora, seed=seed)
    return parts


def load_model(folder: ModelFolder, plan: ParallelPlan, dtype: str = "", backend: str = AUTO, base: str = "") -> Any:
    """Load as `load_stages` does, where the pipeline is not interleaved, and return the rank's one part."""
    (model,) = load_stages(folder, plan, dtype, backend=backend, base=base)
    return model


def load_told(folder: ModelFolder, config: ModelSettings) -> Any:
    """Load as `load_model` does what a phase's settings say."""
    return load_model(folder, config.parallel, dtype=config.dtype, backend=config.backend, base=config.base)


def write(out: Path, model: Any, source: ModelFolder, step: int) -> str:
    """Make `out` (an existing, empty folder) the model folder of `model`, which was loaded from the folder `source`.

    Adapters are written beside the base's weights, which are links to those of `source` where the filesystem has any.
    Returns the weights digest. Every rank takes part; rank 0 writes the plain files.
    """
    import torch.distributed as dist

    from megatron_ext.models.registry import stages
    from megatron_ext.weights import checkpoint

    if checkpoint.is_adapted(model):
        from megatron_ext.lora import adapters

        lora = adapters.write(out / "adapter", model, source.family, source.dims)
        if dist.get_rank() == 0:
            describe_adapted(out, source, lora, step)
    else:
        digest = checkpoint.save_weights(model, out / "weights")
        if dist.get_rank() == 0:
            copy_hf_files(source.hf, out / "hf")
            dtype = str(next(stages(model)[0].parameters()).dtype).removeprefix("torch.")
            describe(out, source.family, step=step, weights_digest=digest, dtype=dtype)
    dist.barrier()
    return durable.read_json(out / "model.json")["weights_digest"]


def describe_adapted(out: Path, base: ModelFolder, lora: LoraConfig, step: int) -> str:
    """Make OUT, which has an adapter, the model folder of it on `base`. Returns the weights digest. One process."""
    from megatron_ext.lora.peft_format import TENSORS

    if base.path != out:
        link_files(base.weights, out / "weights")
        copy_hf_files(base.hf, out / "hf")
    adapter = {
        "lora": asdict(lora),
        "base_digest": base.base_digest,
        "adapter_digest": durable.sha256_file(out / "adapter" / TENSORS),
    }
    digest = durable.sha256_bytes(f"{base.base_digest} {adapter['adapter_digest']}".encode())
    describe(out, base.family, step=step, weights_digest=digest, dtype=base.dtype, adapter=adapter)
    return digest


def adopt(out: Path, peft: Path) -> str:
    """Give the model folder OUT the adapter in a PEFT folder. Returns the new weights digest. One process."""
    from megatron_ext.lora import pairs, peft_config, peft_format

    base, (adapter, problems) = open_folder(out), peft_config.read(peft)
    if problems or adapter is None:
        raise UserMistake(problems)
    lora, reached = pairs.reached(base.family, base.dims, adapter)
    if problems := loras.check(lora, base.shape, str(peft)):
        raise UserMistake(problems)
    adapted = pairs.pairs(base.family, base.dims, lora)
    reader = peft_format.Reader(peft, adapted, lora, reached)
    factors = {}
    for pair in adapted:
        factors[pair.a.name], factors[pair.b.name] = reader.factors(pair)
    peft_format.write(out / "adapter", adapted, factors, lora)
    return describe_adapted(out, base, lora, base.step)


def link_files(source: Path, target: Path) -> None:
    """Put the files of a flat folder into a new one: hard links, or copies where the filesystem has none."""
    target.mkdir()
    for path in files(source):
        file = inside(source, path.name)
        try:
            os.link(file, target / path.name)
        except OSError:
            shutil.copyfile(file, target / path.name)
            durable.fsync_file(target / path.name)  # which digests.json, if it has one, promises


def describe(
    out: Path, family: Family, step: int, weights_digest: str, dtype: str, adapter: dict[str, Any] | None = None
) -> None:
    """Write model.json, which makes `out`, that has its config.json, a model folder. `adapter`: its LoRA's settings and
    the digests of base and adapter."""
    _, dims, problems = read_config(out / "hf")
    if problems:
        raise UserMistake(problems)
    facts = {"format": FORMAT, "family": family.name, "step": step, "weights_digest": weights_digest, "dtype": dtype}
    facts["config"] = meaning(family, dims)
    durable.write_json(out / "model.json", facts | ({"adapter": adapter} if adapter else {}))
