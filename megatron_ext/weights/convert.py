"""Hugging Face safetensors <-> mcore weights, by the family's rules, one tensor at a time.

`import_weights` fills a model on its ranks. The others convert folders without a model, without a process group, and
in the memory of a few tensors: `import_share` and `export_share` move one process's share of them, of which
`finish_import` and `finish_export` make a whole.

Every conversion keeps a ledger (LEDGER, among the Hugging Face files): of each Hugging Face tensor its file, dtype and
shape; of each mcore tensor its sources, layout, dtype and sum (digest.tensor_sum). A model folder carries the ledger
of its import along, so that its export knows the names and dtypes of the base checkpoint.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.files.digest import combined, tensor_sum
from megatron_ext.models.layouts import (
    Entry,
    HfTensor,
    Replicated,
    Rule,
    Stacked,
    hf_dtype,
    hf_name,
    hf_shapes,
    placed,
    shard_on_rank,
)
from megatron_ext.models.registry import Family, model_type
from megatron_ext.weights import copies, dist_weights, rounded, shares
from megatron_ext.weights.dist_weights import Region, pieces, regions
from megatron_ext.weights.hf_files import SHARD_BYTES, HfTensors, SafetensorsFiles

Shape = tuple[int, ...]
Changes = Mapping[str, Callable[[], torch.Tensor]]  # what is added to the whole tensors of some rules, by their names
NO_CHANGES: Changes = {}

LEDGER = "conversion.json"
SUMMING = 2  # threads that add up what one thread writes
BACKLOG = 8  # pieces that may wait for them
LISTED = 12  # wrong tensors that a message names


class Tensors(Protocol):
    """Where Hugging Face tensors are read from: hf_files.HfTensors, or what stands for them in other formats."""

    def shapes(self) -> dict[str, Shape]: ...

    def dtype(self, name: str) -> str: ...

    def file(self, name: str) -> str: ...

    def read(self, tensor: HfTensor) -> torch.Tensor: ...


def check_tensors(shapes: Mapping[str, Shape], family: Family, dims: Any, where: str) -> list[Problem]:
    """Return every tensor that is missing, unknown or of another shape than config.json says."""
    expected = hf_shapes(family.mapping.rules(dims, shapes))
    if not expected.keys() & shapes.keys():
        name, shape = next(iter(shapes.items()), ("nothing", ()))
        return [
            Problem(
                where,
                f"has none of the {len(expected)} tensors of the {model_type(family, dims)} model in config.json "
                f"but {name} {list(shape)}: these are the weights of another model",
            )
        ]
    problems = [
        Problem(where, f"tensor {name} {list(shape)} is missing")
        for name, shape in expected.items()
        if name not in shapes
    ]
    for name, shape in shapes.items():
        if name in expected:
            if shape != expected[name]:
                problems.append(
                    Problem(where, f"tensor {name} has shape {list(shape)}, config.json gives {list(expected[name])}")
                )
        elif not family.mapping.is_redundant(name, dims):
            problems.append(
                Problem(where, f"tensor {name} {list(shape)} is not part of a {model_type(family, dims)} model")
            )
    if len(problems) > LISTED:
        problems[LISTED:] = [Problem(where, f"and {len(problems) - LISTED} more tensors are wrong")]
    return problems


def checked_rules(tensors: Tensors, family: Family, dims: Any, where: str) -> list[Rule]:
    """Return the rules of `tensors`. Raises UserMistake naming all wrong tensors at once."""
    shapes = tensors.shapes()
    problems = check_tensors(shapes, family, dims, where)
    rules = [] if problems else family.mapping.rules(dims, shapes)
    if problems or (problems := copies.check(tensors, rules, dims, where)):
        raise UserMistake(problems)
    return rules


@torch.no_grad()
def import_weights(model: torch.nn.Module, folder: Path, family: Family, dims: Any) -> None:
    """Fill this rank's `model` from the safetensors in `folder`. UserMistake naming all wrong tensors at once."""
    tensors = HfTensors(folder)
    for rule, parameter in placed(model, checked_rules(tensors, family, dims, str(folder))):
        joined = rule.layout.join([tensors.read(tensor) for tensor in rule.hf])
        parameter.copy_(shard_on_rank(rule, joined, model))


# ---------------------------------------------------------------- sums


def summing() -> ThreadPoolExecutor:
    """Return the threads in which `Sums` adds up."""
    return ThreadPoolExecutor(SUMMING, "sums")


class Sums:
    """The sums by key of a rule's tensor, added up by other threads while this one reads and writes."""

    def __init__(self, pool: Executor):
        self._pool = pool
        self._parts: list[tuple[str, Future[torch.Tensor]]] = []

    def add(self, region: Region, data: torch.Tensor) -> None:
        """Count `data`, which must stay as it is until `total`. Waits where BACKLOG others are waiting."""
        self._parts.append((region.key, self._pool.submit(tensor_sum, data, region.offset, region.shape)))
        if len(self._parts) > BACKLOG:
            self._parts[-BACKLOG - 1][1].result()

    def total(self) -> Counter[str]:
        sums: Counter[str] = Counter()
        for key, part in self._parts:
            sums[key] += int(part.result())
        return sums


# ---------------------------------------------------------------- import


def import_share(
    tensors: Tensors, rules: Sequence[Rule], out: Path, dtype: str, index: int, count: int, progress: Progress = silent
) -> None:
    """Write every `count`-th tensor into OUT, for `finish_import`. `dtype` "" keeps each tensor's own."""
    torch.set_num_threads(1)  # bytes are moved, not computed
    own = rules[index::count]
    writer = shares.writer_of(out, index, count)
    ledger: dict[str, dict[str, Any]] = {"hf": {}, "tensors": {}}
    with summing() as pool:
        for done, rule in enumerate(own):
            blocks = _blocks(rule, [tensors.read(tensor) for tensor in rule.hf])
            target = rule.dtype or dtype or _name(blocks[0].dtype)
            ledger["tensors"][rule.name] = _entry(
                rule, target, write_whole(writer, rule, blocks=blocks, dtype=target, pool=pool)
            )
            for name in map(hf_name, rule.hf):
                ledger["hf"][name] = {"file": tensors.file(name), "dtype": tensors.dtype(name)}
            progress(done + 1, len(own), "tensors")
    shares.close(writer, ledger)


def _blocks(rule: Rule, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Yield mcore's whole tensor in blocks of rows: where it is a mere stack of Hugging Face's tensors those, not
    copied.
    """
    if isinstance(rule.layout, Stacked) and len({tensor.dtype for tensor in tensors}) == 1:
        return tensors
    return [rule.layout.join(tensors)]


def write_whole(
    writer: dist_weights.Writer, rule: Rule, blocks: Sequence[torch.Tensor], dtype: str, pool: Executor
) -> Counter[str]:
    """Write a rule's whole tensor, the rows of `blocks`, as `dtype`. Returns its sums by key."""
    sums = Sums(pool)
    for number, region, rows in _regions_of_blocks(rule, [len(block) for block in blocks]):
        for box, data in _boxes(region, blocks[number][rows]):
            part = data.to(getattr(torch, dtype))
            sums.add(box, part)
            writer.write(box, part)
    return sums.total()


def _regions_of_blocks(rule: Rule, heights: Sequence[int]) -> Iterator[tuple[int, Region, slice]]:
    """Yield the regions of a rule, cut where a block of so many rows ends: the block's number, its region, its rows."""
    for region, rows in regions(rule):
        axis = len(region.size) - len(rule.layout.shape)  # experts are stacked before it
        first = 0
        for number, height in enumerate(heights):
            low, high = max(rows.start, first), min(rows.stop, first + height)
            if low < high:
                offset, size = list(region.offset), list(region.size)
                offset[axis], size[axis] = offset[axis] + low - rows.start, high - low
                part = replace(region, offset=tuple(offset), size=tuple(size))
                yield number, part, slice(low - first, high - first)
            first += height


def _boxes(region: Region, data: torch.Tensor) -> Iterator[tuple[Region, torch.Tensor]]:
    """Yield the region, whose elements are `data`, piece by piece."""
    flat = data.reshape(-1)
    for box, first in pieces(region, flat.element_size()):
        yield box, flat[first : first + torch.Size(box.size).numel()].reshape(box.size)


def finish_import(parts: Sequence[Path], out: Path, hf: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Make OUT/weights of all shares a checkpoint and write the ledger, with `facts`, into `hf`. Returns the ledger."""
    told = [shares.read(part) for part in parts]
    shares.finish_weights(parts, told, out)
    return _write_ledger(hf, told, {"direction": "import", **facts})


# ---------------------------------------------------------------- export


def base_ledger(hf: Path) -> dict[str, Any]:
    """Return the ledger of the import that a model folder comes from; empty where it was made otherwise."""
    path = inside(hf, LEDGER, needed=False)
    return durable.read_json(path) if path else {"hf": {}, "tensors": {}}


def main_dtype(dtypes: Mapping[str, str], rules: Sequence[Rule]) -> str:
    """Return the dtype of most elements of a Hugging Face checkpoint, by its tensors' dtypes; "" where it has none of
    them. Tensors that are stored in a format of their own do not count.
    """
    elements: Counter[str] = Counter()
    for name, shape in hf_shapes([rule for rule in rules if not hf_dtype(rule.layout)]).items():
        if name in dtypes:
            elements[dtypes[name]] += math.prod(shape)
    return max(elements, key=lambda dtype: elements[dtype], default="")


def dtypes_of(ledger: Mapping[str, Any]) -> dict[str, str]:
    """Return {Hugging Face tensor: its dtype in the files}."""
    return {name: tensor["dtype"] for name, tensor in ledger["hf"].items()}


def _export_dtypes(
    rules: Sequence[Rule], stored: Mapping[str, str], base: Mapping[str, Any], dtype: str
) -> dict[str, str]:
    """Return {Hugging Face tensor: the dtype it is written in}: `dtype`, or with "" as it is `stored`.

    A tensor that the base checkpoint kept in another dtype than its others (norms, decays) has that one again.
    """
    theirs = dtypes_of(base)
    main, targets = main_dtype(theirs, rules), {}
    for rule in rules:
        for name in map(hf_name, rule.hf):
            kept = theirs.get(name, main)
            plain = rule.dtype or dtype or (stored[rule.name] if kept == main else kept)
            targets[name] = hf_dtype(rule.layout) or plain
    return targets


def export_share(
    weights: Path,
    rules: Sequence[Rule],
    base: dict[str, Any],
    out: Path,
    dtype: str,
    index: int,
    count: int,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
    changes: Changes = NO_CHANGES,
) -> None:
    """Write every `count`-th safetensors file and a share.json into OUT. `dtype` "" gives what `_export_dtypes` says.

    The sums in the ledger are those of `weights`, before any of `changes`.
    """
    torch.set_num_threads(1)
    reader = dist_weights.Reader(weights)
    stored = _stored_dtypes(reader, rules)
    dtypes = _export_dtypes(rules, stored, base, dtype)
    files = SafetensorsFiles(
        out, {name: (dtypes[name], shape) for name, shape in hf_shapes(rules).items()}, shard_bytes
    )
    my_files = set(list(files.files)[index::count])
    own = [rule for rule in rules if any(files.file(hf_name(tensor)) in my_files for tensor in rule.hf)]
    ledger: dict[str, dict[str, Any]] = {"hf": {}, "tensors": {}}
    with summing() as pool:
        for done, rule in enumerate(own):
            sums, lost = _export_one(reader, rule, files=files, my_files=my_files, changes=changes, pool=pool)
            if files.file(hf_name(rule.hf[0])) in my_files:  # of several shares that need a tensor, one counts it
                ledger["tensors"][rule.name] = _entry(rule, stored[rule.name], sums) | lost
            for name in map(hf_name, rule.hf):
                ledger["hf"][name] = {"file": files.file(name), "dtype": dtypes[name]}
            progress(done + 1, len(own), "tensors")
    files.close()
    durable.write_json(out / shares.SHARE, ledger)
    if index == 0:
        files.write_index()


def _export_one(
    reader: dist_weights.Reader,
    rule: Rule,
    files: SafetensorsFiles,
    my_files: set[str],
    changes: Changes,
    pool: Executor,
) -> tuple[Counter[str], dict[str, Any]]:
    """Write the Hugging Face tensors of one rule that are in `my_files`. Return the sums by key, and what was
    rounded (rounded.split)."""
    layout = rule.layout
    if not isinstance(layout, (Replicated, Stacked)) or rule.name in changes:
        whole, sums = read_whole(reader, rule, pool)
        whole = changed(rule, whole, changes)
        tensors, lost = rounded.split(rule, whole, str(reader.folder))
        for position, data in enumerate(tensors):
            _write_entry(files, my_files, rule=rule, position=position, data=data)
        return sums.total(), lost
    sums = Sums(pool)
    # As they are, so that they may pass in pieces of any size.
    heights = layout.rows if isinstance(layout, Stacked) else layout.shape[:1]
    for position, region, rows in _regions_of_blocks(rule, heights):
        before = rows.start * math.prod(layout.shape[1:])
        for box, first in pieces(region, 4):
            data = reader.read(box)
            sums.add(box, data)
            _write_entry(files, my_files, rule=rule, position=position, data=data, first=before + first)
    return sums.total(), {}


def read_whole(reader: dist_weights.Reader, rule: Rule, pool: Executor) -> tuple[torch.Tensor, Sums]:
    """Read a rule's whole tensor; return it and its sums by key."""
    sums, parts = Sums(pool), []
    for region, _ in regions(rule):
        data = reader.read(region)
        for box, part in _boxes(region, data):
            sums.add(box, part)
        parts.append(data.reshape(-1, *rule.layout.shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0], sums


def changed(rule: Rule, whole: torch.Tensor, changes: Changes) -> torch.Tensor:
    """Return `whole` with its change added in fp32, in its own dtype."""
    return (whole.float() + changes[rule.name]()).to(whole.dtype) if rule.name in changes else whole


def _write_entry(
    files: SafetensorsFiles, my_files: set[str], rule: Rule, position: int, data: torch.Tensor, first: int = 0
) -> None:
    tensor = rule.hf[position]
    if files.file(hf_name(tensor)) not in my_files:
        return
    if isinstance(tensor, Entry):
        first += tensor.index * torch.Size(rule.layout.hf_shapes()[position]).numel()
    files.write(hf_name(tensor), data, first)


def finish_export(parts: Sequence[Path], out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Gather the files of all shares in OUT and write the ledger, with `facts`. Return the ledger."""
    told = [durable.read_json(part / shares.SHARE) for part in parts]
    shares.gather(parts, out, "*.safetensors*")
    (out / shares.SHARE).unlink(missing_ok=True)
    return _write_ledger(out, told, {"direction": "export", **facts})


def _stored_dtypes(reader: dist_weights.Reader, rules: Sequence[Rule]) -> dict[str, str]:
    """Return {rule name: dtype in the checkpoint}. Raises UserMistake naming what it lacks."""
    stored, dtypes, problems = reader.tensors(), {}, []
    for rule in rules:
        for region, _ in regions(rule):
            if region.key not in stored:
                problems.append(Problem(str(reader.folder), f"tensor {region.key} {list(region.shape)} is missing"))
            else:
                dtypes[rule.name] = stored[region.key][0]
    if problems:
        raise UserMistake(problems[:LISTED])
    return dtypes


# ---------------------------------------------------------------- shares and ledgers


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(rule: Rule, dtype: str, sums: Mapping[str, int]) -> dict[str, Any]:
    """Return the entry of one mcore tensor in the ledger."""
    return {
        "hf": [tensor if isinstance(tensor, str) else [tensor.name, tensor.index] for tensor in rule.hf],
        "layout": repr(rule.layout),
        "dtype": dtype,
        "keys": {
            region.key: {"shape": region.shape, "sum": f"{sums[region.key] % (1 << 64):016x}"}
            for region, _ in regions(rule)
        },
    }


def _write_ledger(folder: Path, told: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    ledger: dict[str, Any] = {"hf": {}, "tensors": {}}
    for share in told:
        for kind in ledger:
            ledger[kind] |= share[kind]
    sums: dict[str, tuple[str, Shape, int]] = {}
    for entry in ledger["tensors"].values():
        for key, of in entry["keys"].items():
            earlier = sums[key][2] if key in sums else 0  # experts share a key
            sums[key] = (entry["dtype"], tuple(of["shape"]), earlier + int(of["sum"], 16))
    ledger |= {**facts, "weights_digest": combined(sums), "dtype_changes": _dtype_changes(ledger, facts["direction"])}
    durable.write_json(folder / LEDGER, ledger)
    return ledger


def _dtype_changes(ledger: dict[str, Any], direction: str) -> dict[str, int]:
    """ "float32 to bfloat16": number of Hugging Face tensors, or entries of stacks, that the conversion changed."""
    changes: Counter[str] = Counter()
    for entry in ledger["tensors"].values():
        for tensor in entry["hf"]:
            theirs, ours = ledger["hf"][tensor if isinstance(tensor, str) else tensor[0]]["dtype"], entry["dtype"]
            if theirs != ours:
                changes[f"{theirs} to {ours}" if direction == "import" else f"{ours} to {theirs}"] += 1
    return dict(changes)
