"""What ranks do under the stand-ins. Import it in a process that has stand_ins/ on its path, and nowhere else."""

import contextlib
import math
import pickle
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformer_engine
from megatron.core import tensor_parallel
from transformer_engine.pytorch.attention.dot_product_attention import utils as dpa_utils
from transformer_engine.pytorch.distributed import CudaRNGStatesTracker

from data_tools.mistake import UserMistake
from megatron_ext.lora import adapters
from megatron_ext.model_folders import model_folder
from megatron_ext.models.registry import stages
from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import OURS, Parts
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training import certify
from megatron_ext.training.update import AdamW, Trainer
from megatron_ext.weights import checkpoint, dist_weights
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.rl import toy

PACKS = [tiny.pack([20, 9, 3, 32], seed, vocabulary=19) for seed in range(2)]
ALONE = ParallelPlan()
TE = Parts("te", "te", "te", "te")
Lengths = Sequence[Sequence[int]]  # of the documents of each pack
UPDATES, LEARNING_RATE = 3, 1e-2
assert transformer_engine.__file__ and "stand_ins" in transformer_engine.__file__


@contextlib.contextmanager
def _later_kernels() -> Iterator[None]:
    chosen = dpa_utils.get_attention_backend
    dpa_utils.get_attention_backend = lambda asked: chosen(replace(asked, softmax_type="vanilla"))
    try:
        yield
    finally:
        dpa_utils.get_attention_backend = chosen


@contextlib.contextmanager
def _kernels_of_bf16() -> Iterator[None]:
    """Let kernels be chosen as for bf16: in fp32, whose sums are compared, context ranks have none."""
    chosen = dpa_utils.get_attention_backend
    dpa_utils.get_attention_backend = lambda asked: chosen(replace(asked, qkv_dtype=torch.bfloat16))
    try:
        yield
    finally:
        dpa_utils.get_attention_backend = chosen


def measured_alone(of: Any, lengths: Lengths, weights: Path, file: Path) -> None:
    """Write weights, and to `file` what one process of our own layers computes from them."""
    write_weights(of, weights)
    file.write_bytes(pickle.dumps(_measured(of, lengths, weights, ALONE, OURS)))


def measured_together(
    of: Any, lengths: Lengths, weights: Path, file: Path, plan: ParallelPlan, made_of: Parts
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Return certify.Difference of these ranks from what `measured_alone` wrote (rank 0; {} on others), and its losses
    and norm.
    """
    found = _measured(of, lengths, weights, plan, made_of)
    own = {} if not found.gradients else asdict(certify.difference(found, pickle.loads(file.read_bytes())))
    return own, (found.loss, found.later_loss, found.norm)


def _measured(of: Any, lengths: Lengths, weights: Path, plan: ParallelPlan, made_of: Parts) -> certify.Measured:
    packs = [certify.random_pack(each, of.vocabulary, i) for i, each in enumerate(lengths)]
    with _kernels_of_bf16():
        return certify.measure(tiny.family(of), of, plan, weights, packs=packs, made_of=made_of)


def trained_by_grpo(**given: Any) -> dict[str, Any]:
    """Do toy.trained."""
    with _kernels_of_bf16():
        return toy.trained(**given)


def _loaded(
    of: Any, made_of: Parts, weights: Path, plan: ParallelPlan = ALONE, dtype: torch.dtype = torch.float32
) -> list[Any]:
    parts = tiny.family(of).build(of, plan, dtype, made_of)
    checkpoint.load_weights(parts, weights)
    return parts


def write_weights(of: Any, folder: Path) -> None:
    """Write weights that any mixture of parts can load."""
    with ranks.started(ALONE):
        certify.write_random_weights(tiny.family(of), of, folder)


def losses(
    of: Any,
    made_of: Parts,
    weights: Path,
    plan: ParallelPlan = ALONE,
    lora: bool = False,
    kernel_for_sinks: bool = False,
) -> tuple[list[float], list[float]]:
    """Return the losses of a few updates from `weights`, and their gradient norms.

    `kernel_for_sinks`: as if Transformer Engine had one for packed documents, as later releases have.
    """
    with ranks.started(plan), _later_kernels() if kernel_for_sinks else contextlib.nullcontext():
        return _updates(of, _loaded(of, made_of, weights, plan), plan, lora)


def _updates(of: Any, parts: list[Any], plan: ParallelPlan, lora: bool) -> tuple[list[float], list[float]]:
    if lora:
        adapters.attach(parts, tiny.family(of), of, adapted.lora(of), 3)
    trainer = Trainer(parts, plan, AdamW(weight_decay=0.1))
    found, norms = [], []
    for _ in range(UPDATES):
        sums, norm = trainer.step(certify.rows_of(PACKS, plan), LEARNING_RATE)
        found.append(sums.reduced().mean_loss)
        norms.append(norm)
    assert all(map(math.isfinite, found + norms))
    return found, norms


Updates = tuple[list[float], list[float]]  # losses, gradient norms


def sweep(
    of: Any, mixtures: list[Parts], weights: Path, folder: Path, plan: ParallelPlan, lora: bool
) -> dict[Parts, tuple[str, Updates, set[str]]]:
    """Return, by mixture, the digest of the weights that it loaded, its updates, and `_classes`. Each loads what
    the one before saved.

    Transformer Engine has kernels for sinks over packed documents, as later releases have.
    """
    found, last = {}, weights
    with ranks.started(plan), _later_kernels():
        for number, made_of in enumerate(mixtures):
            parts = _loaded(of, made_of, last, plan)
            last = folder / str(number)
            checkpoint.save_weights(parts, last)
            digest = checkpoint.weights_digest(parts)
            found[made_of] = digest, _updates(of, parts, plan, lora), _classes(parts)
    return found


def _classes(parts: list[Any]) -> set[str]:
    """Return the names of all modules' classes, and where they stand: "MLP", "MLP.linear_fc2 RowParallelLinear"."""
    modules = [module for part in parts for module in part.decoder.modules()]
    inside = {
        f"{type(module).__name__}.{name} {type(child).__name__}"
        for module in modules
        for name, child in module.named_children()
    }
    return inside | {type(module).__name__ for module in modules}


def chosen(of: Any, backend: str) -> Parts | str:
    """Return whose layers a model folder is made of in this process, which has a CPU, or why it is refused."""
    folder: Any = types.SimpleNamespace(shape=tiny.family(of).config.shape(of), dtype="float32")
    with ranks.started(ALONE):
        try:
            return model_folder.choose_parts(folder, ALONE, "", backend).parts
        except UserMistake as mistake:
            return str(mistake)


def resumed(of: Any, weights: Path, folder: Path, te_rng: bool) -> tuple[list[float], list[float]]:
    """Return what a training did after a step that it saved, and what another did that went on from that step."""
    with ranks.started(ALONE, te_rng=te_rng):
        assert isinstance(tensor_parallel.get_cuda_rng_tracker(), CudaRNGStatesTracker) == te_rng
        trainer = Trainer(_loaded(of, TE, weights), ALONE, AdamW())
        _update(trainer)
        checkpoint.save_step(
            folder, 1, trainer.model, trainer.optimizer, ALONE, identity={}, position={"step": 1}, keep=2
        )
        first = _update(trainer)
    with ranks.started(ALONE, seed=5, te_rng=te_rng):
        trainer = Trainer(_loaded(of, TE, weights), ALONE, AdamW())
        checkpoint.load_step(folder / "step_1", trainer.model, trainer.optimizer, ALONE, {})
        return first, _update(trainer)


def _update(trainer: Trainer) -> list[float]:
    """Make an update, use up random numbers, and return what came out of both."""
    sums, norm = trainer.step(certify.rows_of(PACKS, ALONE), LEARNING_RATE)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [float(sums.mean_loss), norm, tracked, torch.rand(1).item()]


def exact_in_bf16(of: Any, weights: Path, folder: Path) -> dict[str, str]:
    """Return {name: type} of Mamba's decays in a bf16 model, trained and saved; another type than fp32 comes first."""
    names = ("A_log", "mixer.D", "dt_bias")
    with ranks.started(ALONE):
        trainer = Trainer(_loaded(of, TE, weights, dtype=torch.bfloat16), ALONE, AdamW())
        _update(trainer)
        checkpoint.save_weights(trainer.model, folder / "saved")
        kinds = {name: str(p.dtype) for name, p in stages(trainer.model)[0].named_parameters() if name.endswith(names)}
    saved = {key: kind for key, (kind, *_) in dist_weights.Reader(folder / "saved").tensors().items()}
    saved = {key: str(kind) for key, kind in saved.items() if key.endswith(names)}
    assert kinds and saved
    worst = {}
    for name in names:
        every = {kind.removeprefix("torch.") for key, kind in (kinds | saved).items() if key.endswith(name)}
        worst[name] = min(every, key=lambda kind: kind == "float32")
    return worst
