"""One step of the engine on the model: rows in, logits out, through the stages of a pipeline.

Shapes below: n documents whose next token is asked for, V tokens of the vocabulary, t tensor ranks.
"""

import functools
import sys
from collections.abc import Sequence

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_tools.mistake import UserMistake
from megatron_ext import cpu_linear
from megatron_ext.device import device, plain_torch, send
from megatron_ext.layers.loss_head import position_logits
from megatron_ext.models.registry import unwrap
from megatron_ext.rollout.cache import Cache, CachedRow, NewTokens, cached_row, on_device
from megatron_ext.rollout.graphs import Graphs
from megatron_ext.rollout.kernels import Step, kernel_names
from megatron_ext.rollout.sampler import Drawn, Vocabulary, draw
from megatron_ext.rollout.settings import EngineConfig, Sampling, check_graphs


class Runner:
    """Runs the training model itself, in the shape it has: its parameters are never copied."""

    def __init__(self, model: torch.nn.Module, settings: EngineConfig):
        self.model = unwrap(model)
        self.config = self.model.config
        self.cache = Cache(self.model, self.config, settings.block_size, device())
        group = parallel_state.get_tensor_model_parallel_group()
        self.vocabulary = Vocabulary(group if group.size() > 1 else None)
        self.stages = parallel_state.get_pipeline_model_parallel_group()
        self.unit = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        self.packs = cpu_linear.Packs()
        self.graphs = Graphs(self._decode, self.cache, self.unit) if settings.cuda_graphs else None
        experts, states = bool(self.config.num_moe_experts), bool(self.cache.mixers)
        if problems := check_graphs(settings, experts, states, self.stages.size()):
            raise UserMistake(problems)
        if self.cache.attention and dist.get_rank() == 0:
            _say(f"rollouts: attention over blocks of {settings.block_size} tokens by {self.attention}")

    @property
    def attention(self) -> str:
        """Which kernels compute the attention of a pass over the cache."""
        cache = self.cache
        return kernel_names(Step(cache.dtype, cache.shape[1], cache.block_size, tokens=1, target=cache.target))

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which gives the logits."""
        return self.stages.rank() == self.stages.size() - 1

    @torch.no_grad()
    def logits(self, documents: Sequence[NewTokens], wanted: Sequence[int]) -> torch.Tensor:
        """Return this tensor rank's logits [n, V / t] after the n documents `wanted`.

        They are [n, 0] on all but the last stage.
        """
        with plain_torch(), cpu_linear.using(self.packs):
            if self.graphs and all(len(document.tokens) == 1 for document in documents):
                logits = self.graphs.logits(documents)
                return torch.stack([logits[i] for i in wanted])  # indexing by a list would make the host wait
            ids = [token for document in documents for token in document.tokens]
            filler = -len(ids) % self.unit
            row = cached_row(documents, self.cache, filler)
            ends = numpy.cumsum([len(document.tokens) for document in documents]) - 1
            tokens, rows = on_device([numpy.array([ids + [0] * filler]), ends[list(wanted)]])
            self._receive(tokens.size(1) // self.unit)
            out = position_logits(self.model, tokens, row.positions[None], documents=row, wanted=rows)
            return out if self.is_last else self._send(out).new_empty(len(wanted), 0)

    def _decode(self, tokens: torch.Tensor, row: CachedRow) -> torch.Tensor:
        return position_logits(self.model, tokens, row.positions[None], documents=row, wanted=row.batches[0].rows)

    def idle(self) -> None:
        """Make a pass over nothing, where other ranks wait for this one's experts."""
        self.logits([NewTokens((0,), 0, [self.cache.spare // self.cache.block_size])], [])

    def free(self) -> None:
        """Give back the memory of keys, values, states and packs, and the passes recorded over it."""
        if self.graphs:
            self.graphs.forget()
        self.packs.drop()
        self.cache.free()

    def _receive(self, tokens: int) -> None:
        if self.stages.rank() > 0:
            shape = (tokens, 1, self.config.hidden_size)
            hidden = torch.empty(shape, dtype=self.config.params_dtype, device=self.cache.target)
            dist.recv(hidden, group=self.stages, group_src=self.stages.rank() - 1)
            self.model.set_input_tensor(hidden)

    def _send(self, hidden: torch.Tensor) -> torch.Tensor:
        dist.send(hidden.contiguous(), group=self.stages, group_dst=self.stages.rank() + 1)
        return hidden

    def draw(self, logits: Sequence[torch.Tensor], noise: Sequence[float], sampling: Sampling) -> Drawn:
        """Return a token for each of n rows of logits [V / t], the same on all tensor ranks and stages, in host memory.

        One copy brings it there: the one time in a step that the host waits for a GPU's numbers.
        """
        with plain_torch():
            columns = torch.empty(len(noise), 4, dtype=torch.float64, device=self.cache.target)
            if self.is_last:
                uniforms = send(torch.tensor(noise, dtype=torch.float64))
                first = self.vocabulary.rank * logits[0].size(-1)
                drawn = draw(torch.stack(tuple(logits)), uniforms, sampling, self.vocabulary, first=first)
                columns = torch.stack([part.double() for part in drawn], 1)
            if self.stages.size() > 1:
                columns = columns.contiguous()
                dist.broadcast(columns, group=self.stages, group_src=self.stages.size() - 1)
            columns = columns.cpu()
            return Drawn(columns[:, 0].long(), *(columns[:, i].float() for i in (1, 2, 3)))


@functools.cache
def _say(line: str) -> None:
    """Write a line to the job's log, once."""
    print(line, file=sys.stderr, flush=True)
