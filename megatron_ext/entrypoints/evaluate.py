"""Greedy accuracy of a model folder on the rows of a task, over distinct prompts, by the task's own verifier.

Element i of n takes distinct prompts i, i + n, i + 2n, …; data-parallel ranks share an element's the same way.
`finish` adds the counts. Row order: files as given, then the synthetic stream; the first of equal prompts counts.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from data_tools import durable
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from data_tools.tables import write_table
from data_tools.tasks.task import Row, Source, Task, check_rows, load_task, task_options
from megatron_ext.parallel import ParallelPlan, Workload
from megatron_ext.parallel import check as check_plan
from megatron_ext.rollout.settings import EngineConfig, Sampling, check_engine

SAMPLES, RESULT = "samples.jsonl", "result.json"


@dataclass
class Config:
    model: str = field(default="", metadata={"input": True})  # model folder
    task: str = "calculator"
    task_options: Dict[str, Any] = field(default_factory=dict)
    source: Source = field(default_factory=Source)
    limit: int = 0  # distinct prompts; 0: all
    max_new_tokens: int = 16
    seen_in: Optional[str] = field(default=None, metadata={"input": True})  # training token store: split by it
    dtype: str = ""  # of the weights; "" keeps the model folder's
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"keyed": False})
    backend: str = field(default="torch", metadata={"keyed": False})  # layer spec: torch | te
    parallel: ParallelPlan = field(default_factory=ParallelPlan, metadata={"keyed": False})


def check(config: Config, ranks: int) -> list[Problem]:
    problems = []
    if not config.model:
        problems.append(Problem("model", "is missing: a model folder"))
    problems += check_rows(config.task, config.task_options, config.source)
    if config.max_new_tokens < 1:
        problems.append(Problem("max_new_tokens", f"{config.max_new_tokens} is too few: the least is 1"))
    problems += check_engine(config.engine)
    if config.parallel.virtual > 1:
        problems.append(Problem("parallel.virtual", f"{config.parallel.virtual}: generation has whole stages: use 1"))
    return problems + check_plan(config.parallel, Workload(ranks, backend=config.backend))


def rows(config: Config, task: Task) -> Iterator[Row]:
    """Verified, canonical rows. UserMistake naming file and line where one is malformed; wrong rows are left out."""
    for name in config.source.inputs:
        try:
            file = open(name, encoding="utf-8")
        except OSError as error:
            raise UserMistake(Problem("source.inputs", f"{name}: {error.strerror}")) from None
        with file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    found = task.parse_line(line)
                except ValueError as error:
                    raise UserMistake(Problem(f"{name}:{number}", str(error))) from None
                yield from (task.canonical(row) for row in found if task.verify(row) is None)
    for index in range(config.source.synthetic_rows):
        yield task.synthetic_row(config.source.synthetic_seed, index, config.source.synthetic_split)


def distinct(found: Iterator[Row], limit: int) -> list[Row]:
    """The first row of each prompt, in order, at most `limit` (0: all)."""
    kept: dict[str, Row] = {}
    for row in found:
        if limit and len(kept) == limit:
            break
        kept.setdefault(row.prompt, row)
    return list(kept.values())


def run(
    config: Config, out: Path, keep: Path, progress: Progress = silent, index: int = 0, count: int = 1
) -> dict[str, Any]:
    """Facts: as `_result`. Rank 0 writes OUT/samples.jsonl, OUT/result.json and, for the only element, the table."""
    from data_tools.tokenizer import load_tokenizer
    from megatron_ext import model_folder, ranks

    problems = check(config, ranks.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    task = load_task(config.task)
    options = task_options(task, config.task_options)
    tokenizer = load_tokenizer(str(folder.hf))
    mine = distinct(rows(config, task), config.limit)[index::count]
    prompts = [tokenizer.encode(row.prompt) for row in mine]
    seen = _seen([row.prompt for row in mine], config.seen_in)

    with ranks.started(config.parallel):
        import torch.distributed as dist
        from megatron.core import parallel_state  # may be imported once the device is ready

        from megatron_ext.rollout.engine import Engine
        from megatron_ext.rollout.sequence import Request

        model = model_folder.load_model(folder, config.parallel, config.dtype, config.backend)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        own = range(replicas.rank(), len(prompts), replicas.size())
        engine = Engine(model, config.engine, seed=0, stop_ids={tokenizer.eos_id})
        sampling = Sampling(temperature=0, max_tokens=config.max_new_tokens)
        tokens: dict[int, list[int]] = {}
        for sequence in engine.generate([Request(place, tuple(prompts[place])) for place in own], sampling):
            tokens[sequence.prefix.request.uid] = sequence.completion
            progress(len(tokens), len(own), "prompts")
        parts: list[Any] = [None] * replicas.size()
        dist.all_gather_object(parts, tokens, group=replicas)
        completions = {place: ids for part in parts for place, ids in part.items()}
        writer = ranks.is_writer()
    samples = []
    for place, row in enumerate(mine):
        ids = completions[place]
        ended = bool(ids) and ids[-1] == tokenizer.eos_id
        completion = tokenizer.decode(ids[:-1] if ended else ids)
        samples.append(
            {
                "prompt": row.prompt,
                "answer": row.answer,
                "completion": completion,
                "correct": ended and task.is_correct(row.answer, completion, options),
                "seen": seen[place],
            }
        )
    result = _result(samples)
    if writer:
        durable.write_file(out / SAMPLES, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        durable.write_json(out / RESULT, result)
        if count == 1:
            _table(keep, result, folder.step)
    return result


def _seen(prompts: list[str], store_folder: Optional[str]) -> list[Optional[bool]]:
    """Whether each prompt occurs in the store; None each when no store is named."""
    if not store_folder:
        return [None] * len(prompts)
    from data_tools.store import Store, text_hash

    known = {tuple(pair) for pair in Store(Path(store_folder)).prompt_hashes.tolist()}
    return [tuple(text_hash(prompt)) in known for prompt in prompts]


def _result(samples: List[Dict[str, Any]]) -> dict[str, Any]:
    """Counts and accuracies, overall and, where known, of prompts seen and not seen in training."""
    result: dict[str, Any] = {}
    for name, wanted in (("", (True, False, None)), ("seen_", (True,)), ("unseen_", (False,))):
        of = [sample for sample in samples if sample["seen"] in wanted]
        if name and all(sample["seen"] is None for sample in samples):
            continue
        correct = sum(sample["correct"] for sample in of)
        result[f"{name}prompts"] = len(of)
        result[f"{name}correct"] = correct
        result[f"{name}accuracy"] = correct / len(of) if of else None
    return result


def _table(keep: Path, result: dict[str, Any], step: int) -> None:
    rows_ = [
        [label, result[f"{name}prompts"], result[f"{name}correct"], result[f"{name}accuracy"]]
        for label, name in (("all", ""), ("seen in training", "seen_"), ("not seen", "unseen_"))
        if f"{name}prompts" in result
    ]
    write_table(
        keep, "accuracy", f"Greedy accuracy at step {step}", ["prompts", "distinct", "correct", "accuracy"], rows_
    )


def finish(config: Config, parts: List[Path], out: Path, keep: Path) -> dict[str, Any]:
    """Join the elements' samples, in element order, and their counts. One process."""
    from megatron_ext import model_folder

    samples = [json.loads(line) for part in parts for line in (part / SAMPLES).read_text().splitlines()]
    result = _result(samples)
    durable.write_file(out / SAMPLES, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    durable.write_json(out / RESULT, result)
    _table(keep, result, model_folder.open_folder(config.model).step)
    return result


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
