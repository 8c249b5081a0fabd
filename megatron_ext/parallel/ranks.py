"""Start and stop the ranks of one job: torch.distributed, mcore's groups, random seeds.

Addresses come from the environment, as torchrun and our worker set it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT. Where our worker began the process, its ranks have met already, and go on with that store. Without
WORLD_SIZE, or with 1, the process is alone and needs no address.
"""

import contextlib
import gc
import ipaddress
import itertools
import os
import random
from collections.abc import Iterator
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from data_tools.base import rendezvous
from data_tools.mistake import UserMistake
from megatron_ext.device import NoOwnGpu, backend, gpu_identity, init_device
from megatron_ext.parallel.plan import ParallelPlan, environment, environment_problems

# A collective that waits longer than this on a peer is dead; checkpoints of large models take minutes.
PATIENCE = timedelta(minutes=30)


def world_size_of_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_of_environment() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _as_torch_says() -> Iterator[None]:
    """Raise a time limit that passed, or a store that is gone, as the errors that torch's own stores raise."""
    try:
        yield
    except rendezvous.MeetingTimeout as error:
        raise dist.DistStoreError(str(error)) from None
    except rendezvous.MeetingFailed as error:
        raise dist.DistNetworkError(str(error)) from None


class MeetingStore(dist.Store):
    """The ranks' own store (data_tools/base/rendezvous.py) in the form that torch.distributed takes.

    The names of the methods are those that torch's C++ looks for in a Store written in Python.
    """

    _kept: "list[MeetingStore]" = []  # C++ keeps a Store alive, but not the half of it that is written in Python

    def __init__(self, client: rendezvous.Client):
        super().__init__()
        self._client = client
        self._kept.append(self)

    @_as_torch_says()
    def set(self, key: str, value: "str | bytes") -> None:
        self._client.set(key, value.encode() if isinstance(value, str) else value)

    @_as_torch_says()
    def get(self, key: str) -> bytes:
        return self._client.get(key)

    @_as_torch_says()
    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._client.multi_get(keys)

    @_as_torch_says()
    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        self._client.multi_set(keys, values)

    @_as_torch_says()
    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._client.wait(keys, None if timeout is None else timeout.total_seconds())

    @_as_torch_says()
    def check(self, keys: list[str]) -> bool:
        return self._client.check(keys)

    @_as_torch_says()
    def add(self, key: str, amount: int) -> int:
        return self._client.add(key, amount)

    @_as_torch_says()
    def append(self, key: str, value: bytes) -> None:
        self._client.append(key, value)

    @_as_torch_says()
    def compare_set(self, key: str, expected: "str | bytes", desired: "str | bytes") -> bytes:
        return self._client.compare_set(key, *(v.encode() if isinstance(v, str) else v for v in (expected, desired)))

    @_as_torch_says()
    def deleteKey(self, key: str) -> bool:
        return self._client.delete(key)

    @_as_torch_says()
    def getNumKeys(self) -> int:
        return self._client.count()

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> "MeetingStore":
        return MeetingStore(self._client.again())

    delete_key, num_keys = deleteKey, getNumKeys


_joins = itertools.count()  # with others: every rank joins as often as they do, and one may have worked alone before


def join(patience: timedelta = PATIENCE) -> None:
    """Join the process group. Raises RuntimeError from torch when the address does not answer, NoOwnGpu where ranks
    share a GPU.
    """
    if world_size_of_environment() > 1:
        number = next(_joins)
        # gloo looks its interface up by host name, which fails on machines whose name resolves to nothing.
        if _is_loopback(os.environ.get("MASTER_ADDR", "")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = rendezvous.of_environment(os.environ, patience.total_seconds())
        if store is None:
            dist.init_process_group(backend(), init_method="env://", timeout=patience)
        else:
            # Under a name of its own: the next group of this process must not read the addresses that this one leaves.
            named = dist.PrefixStore(f"join {number}", MeetingStore(store))
            dist.init_process_group(
                backend(),
                store=named,
                rank=rank_of_environment(),
                world_size=world_size_of_environment(),
                timeout=patience,
            )
        _check_own_gpu(dist.distributed_c10d._get_default_store(), gpu_identity(), number)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=patience)


def _check_own_gpu(store: dist.Store, gpu: str, number: int) -> None:
    """Refuse a GPU that another rank has too: NCCL would, without saying what to do. `number` is that of the join."""
    node = os.uname().nodename
    if gpu and store.add(f"ranks of {number} with {node} {gpu}", 1) > 1:
        raise NoOwnGpu(
            f"rank {rank_of_environment()} shares GPU {gpu} of {node} with another rank, and each needs its own: set "
            "resources.gpus_per_node to the number of ranks of a node (and let srun.extra bind none to several)"
        )


def start(plan: ParallelPlan, seed: int = 0, patience: timedelta = PATIENCE, te_rng: bool = False) -> None:
    """Join the ranks unless the caller already did, build mcore's groups for `plan`, and seed every generator.

    `te_rng`: with Transformer Engine's random-number tracker.

    UserMistake when the environment contradicts the plan.
    """
    problems = environment_problems(plan, os.environ)
    if problems:
        raise UserMistake(problems)
    os.environ.update(environment(plan))
    gc.collect()  # models of an earlier start sit in reference cycles and keep its groups, each with threads that poll
    init_device()
    from megatron.core import parallel_state

    if not dist.is_initialized():
        join(patience)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tensor,
        pipeline_model_parallel_size=plan.pipeline,
        virtual_pipeline_model_parallel_size=plan.virtual if plan.virtual > 1 else None,
        context_parallel_size=plan.context,
        expert_model_parallel_size=plan.expert,
        expert_tensor_parallel_size=plan.expert_tensor,
        create_gloo_process_groups=backend() != "gloo",  # the groups are gloo groups already
        distributed_timeout_minutes=patience // timedelta(minutes=1),
    )
    set_seed(seed, te_rng)


def set_seed(seed: int, te_rng: bool = False) -> None:
    """Seed Python, NumPy, torch, and mcore's tracker (which adds the tensor rank for tensor-parallel regions)."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=te_rng, force_reset_rng=True)


def stop(process_group: bool = True) -> None:
    """Leave mcore's groups and, if asked, the process group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if process_group:
        dist.destroy_process_group()


@contextlib.contextmanager
def started(plan: ParallelPlan, seed: int = 0, patience: timedelta = PATIENCE, te_rng: bool = False) -> Iterator[None]:
    """Call `start` and `stop` around a block. A process group that the caller made stays.

    After an exception among several ranks the groups are left as they are: destroying them would wait for peers that
    do not know. The process is expected to end.
    """
    owned = not dist.is_initialized()
    start(plan, seed, patience, te_rng)
    good = False
    try:
        yield
        good = True
    finally:
        if good or dist.get_world_size() == 1:
            stop(process_group=owned)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Keep the process group around several `started`, each of which builds its own groups."""
    join()
    yield
    dist.destroy_process_group()


def is_writer() -> bool:
    """Return True on the one rank that writes plain files."""
    return dist.get_rank() == 0
