"""The training loop.

`Trainer` holds the model in mcore's DistributedDataParallel with the distributed optimizer and does one update at a
time; `train_on_packs` drives it over a pack plan with schedule, metrics, checkpoints and resume.

Loss and gradient of a step are sums over supervised tokens, divided once by the number of supervised tokens in the
whole global batch, over all micro-batches and ranks (reference/megatron.md 3.4: any mean of means is biased when
packs hold unequal numbers of them).

What a rank trains on in a step: rows.py.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from data_tools.mistake import UserMistake
from data_tools.progress import Progress, Stop, Stopped, never, silent
from megatron_ext import checkpoint
from megatron_ext.device import device, plain_torch
from megatron_ext.layers.loss_head import supervised_losses
from megatron_ext.metrics import Metrics
from megatron_ext.parallel import ParallelPlan
from megatron_ext.rows import MicroBatch, Packs, micro_batch
from megatron_ext.schedule import Schedule


@dataclass(frozen=True)
class AdamW:
    """Optimizer settings. Weight decay spares one-dimensional parameters: norms and biases. `clip` 0: no clipping."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass
class Sums:
    """Sums over steps or micro-batches. Of ranks that hold the same numbers one has them, until `reduced`.

    The loss stays on the device until then: a read in mid-step would make a GPU wait.
    """

    loss: float | torch.Tensor = 0.0
    supervised: int = 0
    tokens: int = 0

    def add(self, other: "Sums") -> None:
        self.loss += other.loss
        self.supervised += other.supervised
        self.tokens += other.tokens

    def reduced(self) -> "Sums":
        """The sums over all ranks, the same on every rank."""
        box = torch.tensor([float(self.loss), self.supervised, self.tokens], dtype=torch.float64, device=device())
        dist.all_reduce(box)
        loss, supervised, tokens = box.tolist()
        return Sums(loss, int(supervised), int(tokens))

    @property
    def mean_loss(self) -> float:
        return self.loss / self.supervised if self.supervised else 0.0


class NonFinite(UserMistake):
    """Loss or gradient became inf or NaN."""


# From the losses [n] of a micro-batch's supervised tokens, -log p of each, to the sum that is minimised.
LossFunction = Callable[[torch.Tensor, MicroBatch], torch.Tensor]


def sum_of_losses(losses: torch.Tensor, rows: MicroBatch) -> torch.Tensor:
    return losses.sum()


def losses_of(model: torch.nn.Module, rows: MicroBatch) -> torch.Tensor:
    """Losses fp32 [n] of the supervised tokens; what goes to the next rank on a pipeline's stages before the last."""
    return supervised_losses(model, rows.ids, rows.positions, rows.documents, rows.targets, rows.supervised)


class Trainer:
    """A model that is being trained on these ranks. Weights must be loaded before.

    `model` is this rank's part of it, or the list of its parts where the pipeline is interleaved (registry.stages).
    """

    def __init__(self, model: torch.nn.Module | list[torch.nn.Module], plan: ParallelPlan, settings: AdamW):
        parts = model if isinstance(model, list) else [model]
        config = parts[0].config
        self.plan = plan
        self.model = [
            DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=False,
                    overlap_param_gather=False,
                ),
                Float16Module(config, part) if config.bf16 or config.fp16 else part,
            )
            for part in parts
        ]
        for part in self.model:
            _count_padding(part)
        self.weight_decay = settings.weight_decay
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,  # set at every step
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.clip if settings.clip > 0 else math.inf,  # 0 would skip the norm as well
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.model,
            use_gloo_process_groups=False,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss if config.fp16 else None
        self._forward_backward = get_forward_backward_func()

    def gradient(
        self, rows: Sequence[MicroBatch], loss_function: LossFunction = sum_of_losses, everywhere: bool = False
    ) -> Sums:
        """Leave the gradient of the mean loss, over all micro-batches of all ranks, in the parameters' `main_grad`.

        Only the share that the rank's optimizer needs is right there, or `everywhere` all of it. Returns this rank's
        sums.
        """
        sums = Sums()
        counts = parallel_state.get_tensor_model_parallel_rank() == 0  # the others have the same numbers

        def forward(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            batch = next(iterator)

            def with_count(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
                loss, count = loss_function(found, batch), batch.supervised.numel()
                if counts:
                    sums.add(Sums(loss.detach().double(), count, batch.ids.numel()))
                return loss, torch.tensor(count, dtype=torch.int, device=loss.device), {}

            with plain_torch():
                return losses_of(model, batch), with_count

        for part in self.model:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._forward_backward(
            forward_step_func=forward,
            data_iterator=[iter(rows) for _ in self.model],
            model=self.model,
            num_microbatches=len(rows),
            seq_length=rows[0].documents.total_tokens,
            micro_batch_size=1,
            force_all_reduce=everywhere,
        )
        return sums

    def step(
        self,
        rows: Sequence[MicroBatch],
        rate: float,
        loss_function: LossFunction = sum_of_losses,
        before_update: Callable[[], None] | None = None,
    ) -> tuple[Sums, float]:
        """One update from this rank's micro-batches. Returns this rank's sums and the global gradient norm.

        `before_update` is called once the gradient is there.
        The norm is that of the gradient of the mean loss, before clipping. A non-finite one has already spoilt the
        weights: the caller must stop.
        """
        sums = self.gradient(rows, loss_function)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.weight_decay * group["wd_mult"]
        if before_update is not None:
            before_update()
        _, norm, _ = self.optimizer.step()
        return sums, float(norm)


def _count_padding(model: DistributedDataParallel) -> None:
    """Without it the optimizer's state is saved and loaded shifted where a buffer has several buckets, as with tied
    embeddings in a pipeline: mcore concatenates the buckets without their padding, then cuts parameters out at places
    that count it (distrib_optimizer.py:1118,1498)."""
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


# ---------------------------------------------------------------- over packs


@dataclass(frozen=True)
class Run:
    """What `train_on_packs` needs besides model and data."""

    schedule: Schedule
    global_batch: int  # packs a step
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 0  # 0: only at the end
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Outcome:
    """Facts about a finished training, the same on every rank."""

    step: int
    first_loss: float
    last_loss: float
    tokens: int
    supervised_tokens: int
    resumed_from: int
    notes: list[str]


def rows_of_step(packs: Packs, k: int, run: Run, plan: ParallelPlan) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of step `k`."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = packs.share(k, run.global_batch, run.seed, rank, size)
    return [
        micro_batch([packs.pack(i) for i in mine[start : start + plan.micro_batch]])
        for start in range(0, len(mine), plan.micro_batch)
    ]


def train_on_packs(
    trainer: Trainer,
    packs: Packs,
    run: Run,
    keep: Path,
    identity: dict[str, Any],
    progress: Progress = silent,
    stop: Stop = never,
) -> Outcome:
    """Train to the end of the schedule, from the newest valid checkpoint in KEEP/checkpoints if there is one.

    `identity` names what makes two runs the same (JSON values); the plan's digest is added. Raises UserMistake when a
    checkpoint of another identity lies there, NonFinite naming the step when loss or gradient is inf or NaN, Stopped
    on every rank once any rank's `stop` is true: before the next step, with the last one in a checkpoint.
    Afterwards KEEP/checkpoints has the last step. Every rank takes part and returns the same.
    """
    root, plan = keep / "checkpoints", trainer.plan
    identity = {**identity, "packs": packs.digest, "global_batch": run.global_batch, "seed": run.seed}
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(root)
    dist.barrier()
    folder, notes = checkpoint.newest_valid(root)
    done, window, whole, first_loss, last_loss = 0, Sums(), Sums(), 0.0, 0.0
    if folder is not None:
        done, position = checkpoint.load_step(folder, trainer.model, trainer.optimizer, plan, identity)
        first_loss, last_loss = position["first_loss"], position["last_loss"]
        if dist.get_rank() == 0:  # sums of all ranks: one rank carries them on
            window, whole = Sums(**position["window"]), Sums(**position["whole"])
    resumed_from = done
    metrics = Metrics(keep / "metrics.jsonl", resumed_from)
    schedule, steps = run.schedule, run.schedule.steps
    progress(done, steps, "steps", f"resumed from {folder.name}" if folder else "")
    saved = done

    def publish(step: int) -> None:
        """Make `step` durable, with what the next one continues from."""
        nonlocal window, whole, saved
        window_sum, whole_sum = window.reduced(), whole.reduced()
        window, whole = (window_sum, whole_sum) if dist.get_rank() == 0 else (Sums(), Sums())
        checkpoint.save_step(
            root,
            step,
            trainer.model,
            trainer.optimizer,
            plan,
            identity=identity,
            position={
                "window": vars(window_sum),
                "whole": vars(whole_sum),
                "first_loss": first_loss,
                "last_loss": last_loss,
            },
            keep=run.keep_checkpoints,
        )
        saved = step

    vote = StopVote(stop)
    vote.send()
    since, timed = time.perf_counter(), 0
    for k in range(done, steps):
        if vote.count():
            if k > saved:
                publish(k)
            raise Stopped(k, steps)
        rate = schedule.rate(k)
        sums, norm = trainer.step(rows_of_step(packs, k, run, plan), rate, before_update=vote.send)
        step = k + 1
        if not math.isfinite(norm):
            total = sums.reduced()
            raise NonFinite(
                f"step {step}: the gradient norm is {norm} and the loss {total.mean_loss} at learning rate {rate:g}; "
                f"the last checkpoint is step {_newest(root)}. Lower lr or raise warmup_steps"
            )
        window.add(sums)
        whole.add(sums)
        timed += 1
        log = step % run.log_every == 0 or step == steps
        save = step == steps or (run.checkpoint_every > 0 and step % run.checkpoint_every == 0)
        if log or step == 1:
            total = window.reduced()
            last_loss = total.mean_loss
            if step == 1:
                first_loss = last_loss
            if not math.isfinite(last_loss):
                raise NonFinite(f"the loss up to step {step} is {last_loss}. Lower lr or raise warmup_steps")
        if log:
            now = time.perf_counter()
            per_step = (now - since) / timed
            metrics.append(
                {
                    "step": step,
                    "loss": last_loss,
                    "lr": rate,
                    "grad_norm": norm,
                    "tokens": total.tokens,
                    "supervised_tokens": total.supervised,
                    "step_s": per_step,
                    "tokens_per_s": run.global_batch * packs.pack_length / per_step,
                }
            )
            window, since, timed = Sums(), now, 0
        progress(step, steps, "steps", f"loss {last_loss:.4f}, lr {rate:.2e}")
        if save:
            publish(step)
            since, timed = time.perf_counter(), 0  # the next line's step_s is training, not saving
    vote.count()  # done anyway, but nothing may be under way when the groups end
    total = whole.reduced()
    return Outcome(steps, first_loss, last_loss, total.tokens, total.supervised, resumed_from, notes)


class StopVote:
    """Whether any rank is to stop, with one answer for all: a signal reaches them at different moments.

    Sent between gradient and update, counted before the next step: one number, reduced while the update's own
    collectives run, so that no rank waits for it (tests/benchmarks/stop_check.py).
    """

    def __init__(self, stop: Stop):
        self.stop = stop
        self.box = torch.zeros(1, device=device())
        self.work: Any = None

    def send(self) -> None:
        self.box.fill_(float(self.stop()))
        self.work = dist.all_reduce(self.box, op=dist.ReduceOp.MAX, async_op=True)

    def count(self) -> bool:
        self.work.wait()
        return self.box.item() > 0


def _newest(root: Path) -> int:
    found = checkpoint.steps(root)
    return found[0] if found else 0
