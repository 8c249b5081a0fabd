"""What mcore's `dist_checkpointing.load` does with a checkpoint, with every byte read by dist_weights.Reader.

mcore and torch would unpickle .metadata, common.pt and objects beside the tensors with everything allowed
(torch/distributed/checkpoint/filesystem.py, `read_metadata`; default_planner.py, `load_bytes`). The plan of what goes
where stays theirs.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch.distributed import checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.files.stored import Box, Table
from megatron_ext.weights import dist_weights
from megatron_ext.weights.exchange import from_rank_zero


def load(wanted: ShardedStateDict, folder: Path) -> StateDict:
    """Fill `wanted`, sharded tensors of any layout, from the distributed checkpoint `folder`. Every rank takes part.

    Rank 0 alone reads what is stored where, and tells it. UserMistake, on every rank, where the folder is none, or
    holds what is not understood.
    """
    table: Table | Exception = from_rank_zero(_table(folder) if dist.get_rank() == 0 else None)
    if isinstance(table, Exception):
        raise table
    force_all_tensors_to_non_fp8(wanted)  # else weights of FP8 would be rounded on their way into the optimizer
    sharded, state, factories = load_preprocess(wanted)
    sharded, _ = extract_sharded_base(sharded)
    merge(state, _filled(sharded, folder, table))
    loaded: StateDict = apply_factory_merges(state, factories)
    return loaded


def _table(folder: Path) -> Table | Exception:
    """Return what a checkpoint keeps where, or what went wrong, which all ranks are to raise. One rank."""
    try:
        path = inside(folder, "metadata.json")
        facts = durable.read_json(path)
        if facts != dist_weights.FORMAT:
            raise UserMistake(Problem(str(path), f"is {facts!r}, and only {dist_weights.FORMAT} is read"))
        return Table.of(dist_weights.Reader(folder).stored)
    except Exception as error:
        return error


def _boxes(tensor: Any) -> list[Box]:
    """Return the boxes of a tensor that this rank has; none of what is no tensor."""
    if not isinstance(tensor, torch.Tensor) and not hasattr(tensor, "__create_chunk_list__"):
        return []
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in _create_chunk_list(tensor)]


def _filled(wanted: ShardedStateDict, folder: Path, table: Table) -> StateDict:
    """Return what `wanted` asks for, as mcore's strategy for torch_dist gives it (strategies/torch.py, `load`)."""
    sharded = [tensor for tensor in nested_values(wanted) if isinstance(tensor, ShardedTensor)]
    by_key, nesting, renamed = _replace_state_dict_keys_with_sharded_keys(wanted)
    tensors = mcore_to_pyt_state_dict(by_key, True)
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[tensor for tensor in sharded if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={tensor.key: tensor for tensor in sharded if tensor.allow_shape_mismatch},
    )
    own = table.cut({key: _boxes(tensor) for key, tensor in tensors.items()})
    reader = _Reader(dist_weights.Reader(folder, known=own))
    checkpoint.load_state_dict(tensors, reader, planner=planner)
    loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
    state: StateDict = _replace_sharded_keys_with_state_dict_keys(loaded, nesting, renamed)
    _restore_dict_types(state, wanted)
    return state


class _Reader(StorageReader):
    """torch's interface to the files of a checkpoint, by a dist_weights.Reader of what this rank needs of it."""

    def __init__(self, reader: dist_weights.Reader):
        self._reader = reader
        self._pieces: dict[MetadataIndex, tuple[str, Any]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return torch's form of what the checkpoint holds for this rank."""
        keys: dict[str, Any] = {key: BytesStorageMetadata() for key in self._reader.stored.objects}
        for key, tensor in self._reader.stored.tensors.items():
            boxes = []
            for piece in tensor.pieces:
                boxes.append(ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size)))
                self._pieces[MetadataIndex(key, piece.offset)] = key, piece
            dtype = TensorProperties(getattr(torch, tensor.dtype))
            keys[key] = TensorStorageMetadata(dtype, torch.Size(tensor.shape), boxes)
        return Metadata(keys, storage_data=self._pieces)

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what this rank's plan names."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                said = f"{item.storage_index.fqn} is an object, and only tensors are read from checkpoints"
                raise UserMistake(Problem(str(self._reader.folder), said))
            key, piece = self._pieces[item.storage_index]
            data = narrow_tensor_by_index(self._reader.load(key, piece), item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(data)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
