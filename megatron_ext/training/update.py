"""One update at a time of a model over its ranks.

`Trainer` holds the model in mcore's DistributedDataParallel with the distributed optimizer, or Muon (muon.py). Loss
and gradient of a step are sums over supervised tokens, divided once by the number of supervised tokens in the whole
global batch, over all micro-batches and ranks: a mean of the packs' means would weigh a token of a pack with few of
them more. What a rank trains on: rows.py. What drives it over a run: loop.py.

Shapes below: n supervised tokens of a micro-batch that this rank holds.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from data_tools.mistake import UserMistake
from megatron_ext.device import device, plain_torch
from megatron_ext.layers import router_replay
from megatron_ext.layers.loss_head import supervised_losses
from megatron_ext.models.registry import stages
from megatron_ext.parallel.plan import ParallelPlan, padded_rows
from megatron_ext.training.metrics import Clock
from megatron_ext.training.muon import MUON, Muon, optimizer_fields
from megatron_ext.training.options import Engine
from megatron_ext.training.rows import MicroBatch
from megatron_ext.training.settings import TrainingSettings

PLAIN = Engine()


@dataclass(frozen=True)
class AdamW:
    """Optimizer settings. Weight decay spares one-dimensional parameters: norms and biases. `clip` 0: no clipping.

    With `muon` they are of what is no matrix between the layers (muon.py); rate, weight decay and clip are of all.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    muon: Muon | None = None

    @classmethod
    def of(cls, settings: TrainingSettings) -> "AdamW":
        """Return the optimizer settings of a training's config."""
        return cls(
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
            clip=settings.clip_grad,
            muon=settings.muon if settings.optimizer == MUON else None,
        )


@dataclass
class Sums:
    """Sums over steps or micro-batches. Of ranks that hold the same numbers one has them, until `reduced`.

    The loss stays on the device until then: a read in mid-step would make a GPU wait.
    """

    loss: float | torch.Tensor = 0.0
    supervised: int = 0
    tokens: int = 0

    def add(self, other: "Sums") -> None:
        """Add other sums to these."""
        self.loss += other.loss
        self.supervised += other.supervised
        self.tokens += other.tokens

    def reduced(self) -> "Sums":
        """Return the sums over all ranks, the same on every rank."""
        box = torch.tensor([float(self.loss), self.supervised, self.tokens], dtype=torch.float64, device=device())
        dist.all_reduce(box)
        loss, supervised, tokens = box.tolist()
        return Sums(loss, int(supervised), int(tokens))

    @property
    def mean_loss(self) -> float:
        """The mean over the supervised tokens, 0 where there are none."""
        return float(self.loss) / self.supervised if self.supervised else 0.0


class NonFinite(UserMistake):
    """Loss or gradient became inf or NaN."""


Row = TypeVar("Row", bound=MicroBatch)
# From the losses [n] of a micro-batch's supervised tokens, -log p of each, to the sum that is minimised.
LossFunction = Callable[[torch.Tensor, Row], torch.Tensor]


def sum_of_losses(losses: torch.Tensor, rows: MicroBatch) -> torch.Tensor:
    """Return the sum of the losses [n], which is what SFT minimises."""
    return losses.sum()


def losses_of(model: torch.nn.Module, rows: MicroBatch) -> torch.Tensor:
    """Return the losses fp32 [n] of the supervised tokens.

    On a pipeline's stages before the last: what goes to the next rank.
    """
    router_replay.steer(model, rows.chosen)
    return supervised_losses(
        model,
        rows.ids,
        rows.positions,
        documents=rows.documents,
        targets=rows.targets,
        supervised=rows.supervised,
    )


class Trainer:
    """A model that is being trained on these ranks. Weights must be loaded before.

    `model` is this rank's part of it, or the list of its parts where the pipeline is interleaved (registry.stages).
    Every step marks its parts on `clock`: forward_backward (this rank's own, and what it waits for in it), reduce,
    update.
    """

    def __init__(
        self,
        model: torch.nn.Module | list[torch.nn.Module],
        plan: ParallelPlan,
        settings: AdamW,
        engine: Engine = PLAIN,
    ):
        parts = model if isinstance(model, list) else [model]
        config = parts[0].config
        assert isinstance(config, TransformerConfig)  # which mcore gives each of its modules
        self.plan = plan
        self.clock = Clock()
        self.zeros: int | None = None  # of the last step's gradient, where it was to count them
        self._parts = [
            _Parallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=settings.muon is None,
                    overlap_grad_reduce=engine.overlap_grad_reduce,
                    overlap_param_gather=engine.overlap_param_gather,
                ),
                Float16Module(config, part) if config.bf16 or config.fp16 else part,
            )
            for part in parts
        ]
        for wrapped in self._parts:
            _count_padding(wrapped)
        self.model: list[torch.nn.Module] = [*self._parts]
        self.weight_decay = settings.weight_decay
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=0.0,  # set at every step
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.clip if settings.clip > 0 else math.inf,  # 0 would skip the norm as well
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                overlap_param_gather=engine.overlap_param_gather,
                **_which(settings.muon),
                **_offloading(engine),
            ),
            self.model,
            use_gloo_process_groups=False,
        )
        # Where LoRA adapts experts alone and these are over ranks, mcore's optimizer of the others is an empty shell.
        self.optimizer = ChainedOptimizer([part for part in optimizer.chained_optimizers if not part.is_stub_optimizer])
        config.finalize_model_grads_func = self._finalize
        if engine.overlap_grad_reduce:  # only the last micro-batch's gradients start a reduction
            syncs = [wrapped.no_sync for wrapped in self._parts]
            config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        whole = stages(parts)[0]
        added = padded_rows(whole.vocabulary_rows, plan.tensor) - whole.vocabulary_rows
        self._padding = added * config.hidden_size * (1 if whole.share_embeddings_and_output_weights else 2)
        self._gathers_late = engine.overlap_param_gather
        config.grad_scale_func = self.optimizer.scale_loss if config.fp16 else None
        self._forward_backward = get_forward_backward_func()

    def gradient(
        self, rows: Sequence[Row], loss_function: LossFunction[Row] = sum_of_losses, everywhere: bool = False
    ) -> Sums:
        """Leave the gradient of the mean loss, over all micro-batches of all ranks, in the parameters' `main_grad`.

        Only the share that the rank's optimizer needs is right there, or `everywhere` all of it. Returns this rank's
        sums.
        """
        sums = Sums()
        for part in self._parts:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.clock.start()
        self._forward_backward(
            **self._over(rows, sums, loss_function),
            force_all_reduce=everywhere,
        )
        return sums

    @torch.no_grad()
    def evaluate(self, rows: Sequence[MicroBatch]) -> Sums:
        """Return this rank's sums over micro-batches, as many on every rank, without dropout or gradients."""
        sums = Sums()
        for part in self.model:
            part.eval()
        self._forward_backward(**self._over(rows, sums, sum_of_losses), forward_only=True)
        for part in self.model:
            part.train()
        return sums

    def _over(self, rows: Sequence[Row], sums: Sums, loss_function: LossFunction[Row]) -> dict[str, Any]:
        """Return arguments of mcore's schedule for a pass over `rows` that adds to `sums`."""
        counts = parallel_state.get_tensor_model_parallel_rank() == 0  # the others have the same numbers

        def forward(iterator: Iterator[Row], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            batch = next(iterator)

            def with_count(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
                loss, count = loss_function(losses, batch), batch.supervised.numel()
                if counts:
                    sums.add(Sums(loss.detach().double(), count, batch.ids.numel()))
                return loss, loss.new_full((), count, dtype=torch.int), {}  # a copy of it would wait for forward

            with plain_torch():
                return losses_of(model, batch), with_count

        return dict(
            forward_step_func=forward,
            data_iterator=[iter(rows) for _ in self._parts],
            model=self._parts,
            num_microbatches=len(rows),
            seq_length=rows[0].documents.total_tokens,
            micro_batch_size=1,
        )

    def _finalize(self, *arguments: Any, **named: Any) -> None:
        self.clock.mark("forward_backward")
        finalize_model_grads(*arguments, **named)
        self.clock.mark("reduce")

    def settle(self) -> None:
        """Make the weights whole on every rank, where they would be gathered by the next forward pass only."""
        if self._gathers_late:
            for part in self._parts:
                part.disable_forward_pre_hook(param_sync=True)
                part.enable_forward_pre_hook()

    @contextmanager
    def offloaded(self, wanted: bool) -> Iterator[None]:
        """Keep optimizer state and gradients off the device inside, where `wanted`: a rollout has the room.

        mcore's own functions (optimizer/optimizer.py:344, distributed/distributed_data_parallel.py:575); gradients are
        not copied, since each update begins with zeros.
        """
        if not wanted:
            yield
            return
        for part in self._parts:
            part.offload_grad_buffers()
        self.optimizer.offload_to_cpu()
        try:
            yield
        finally:
            self.optimizer.restore_from_cpu()
            for part in self._parts:
                part.restore_grad_buffers()

    def step(
        self,
        rows: Sequence[Row],
        rate: float,
        loss_function: LossFunction[Row] = sum_of_losses,
        before_update: Callable[[], None] | None = None,
        count_zeros: bool = False,
    ) -> tuple[Sums, float]:
        """Make one update from this rank's micro-batches. Return this rank's sums and the global gradient norm.

        `before_update` is called once the gradient is there. `count_zeros` has `zeros` tell how many of the whole
        gradient's elements are 0, padding of the vocabulary aside.
        The norm is that of the gradient of the mean loss, before clipping. A non-finite one has already spoilt the
        weights: the caller must stop.
        """
        sums = self.gradient(rows, loss_function)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.weight_decay * group["wd_mult"]
        if before_update is not None:
            before_update()
        for optimizer in (self.optimizer, *self.optimizer.chained_optimizers):
            optimizer.config.log_num_zeros_in_grad = count_zeros
        _, norm, zeros = self.optimizer.step()
        self.zeros = int(zeros) - self._padding if count_zeros else None
        self.clock.mark("update")
        return sums, float(norm)


def _which(muon: Muon | None) -> dict[str, Any]:
    """Return the fields of OptimizerConfig that say which optimizer it is, and whether data ranks share its state."""
    if muon is None:
        return dict(optimizer="adam", use_distributed_optimizer=True)
    return dict(optimizer=MUON, use_distributed_optimizer=False, **optimizer_fields(muon))


def _offloading(engine: Engine) -> dict[str, Any]:
    """Return the fields of OptimizerConfig that put state in host memory; none where mcore's defaults do."""
    if not engine.offload_optimizer:
        return {}
    return dict(
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=engine.offload_optimizer,
        overlap_cpu_optimizer_d2h_h2d=engine.overlap_offload,
        use_precision_aware_optimizer=True,  # what offloading is built on
    )


class _Parallel(DistributedDataParallel):
    """mcore's wrapper, but for what it hooks onto gradients, which here does not keep the wrapper alive.

    Such a cycle, half of it in C++, is never collected, and each of its process groups has threads that poll.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable:
        return DistributedDataParallel._make_backward_post_hook(weakref.proxy(self), param)


def _count_padding(model: DistributedDataParallel) -> None:
    """Have mcore count the padding of buckets where it loads the optimizer's state.

    Without, the state is loaded shifted where a buffer has several buckets, as with tied embeddings in a pipeline:
    mcore concatenates the buckets without their padding, then cuts parameters out at places that count it
    (distrib_optimizer.py:1118,1498).
    """
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
