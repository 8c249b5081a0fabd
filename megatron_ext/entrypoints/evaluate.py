"""Accuracy of a model folder on the rows of a task, over distinct prompts, by the task's own verifier: greedy, and the
mean of samples at a temperature. With `compare_with` also what was gained over an earlier evaluation, prompt by prompt.

Element i of n takes distinct prompts i, i + n, i + 2n, …; data-parallel ranks share an element's the same way.
`finish` adds the counts. Row order: files as given, then the synthetic stream; the first of equal prompts counts.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from data_tools import durable
from data_tools.estimators import standard_error
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from data_tools.tables import write_table
from data_tools.tasks.task import Row, Source, Task, check_rows, load_task, task_options
from megatron_ext.parallel import ParallelPlan, Workload
from megatron_ext.parallel_rules import check as check_plan
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
    samples: int = 0  # of each prompt, at `temperature`, besides the greedy one
    temperature: float = 1.0
    seed: int = 0  # of the samples
    compare_with: Optional[str] = field(default=None, metadata={"input": True})  # output of another evaluation
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
    if config.samples < 0:
        problems.append(Problem("samples", f"{config.samples} is negative; 0 is greedy alone"))
    if not config.temperature > 0:
        problems.append(Problem("temperature", f"{config.temperature} is not above 0; greedy accuracy is always there"))
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
        engine = Engine(model, config.engine, config.seed, stop_ids={tokenizer.eos_id})
        ways = [(Sampling(temperature=0, max_tokens=config.max_new_tokens), 1)]
        if config.samples:
            ways.append((Sampling(config.temperature, max_tokens=config.max_new_tokens), config.samples))
        found: list[tuple[int, int, list[int]]] = []  # place of the prompt, way, new tokens
        total = len(own) * (1 + config.samples)
        for way, (sampling, samples) in enumerate(ways):
            uids = {uid_of(prompts[place]): place for place in own}
            requests = [Request(uid, tuple(prompts[place]), samples) for uid, place in uids.items()]
            for sequence in engine.generate(requests, sampling):
                found.append((uids[sequence.prefix.request.uid], way, sequence.completion))
                progress(len(found), total, "samples")
        parts: list[Any] = [None] * replicas.size()
        dist.all_gather_object(parts, found, group=replicas)
        completions: dict[tuple[int, int], list[list[int]]] = {}
        for place, way, ids in (one for part in parts for one in part):
            completions.setdefault((place, way), []).append(ids)
        writer = ranks.is_writer()
    kind = getattr(task, "kind", None)

    def judged(row: Row, ids: list[int]) -> tuple[str, bool]:
        ended = bool(ids) and ids[-1] == tokenizer.eos_id
        completion = tokenizer.decode(ids[:-1] if ended else ids)
        return completion, ended and task.is_correct(row.answer, completion, options)

    samples = []
    for place, row in enumerate(mine):
        completion, correct = judged(row, completions[place, 0][0])
        sample = {"prompt": row.prompt, "answer": row.answer, "completion": completion, "correct": correct}
        sample["seen"] = seen[place]
        if config.samples:
            sample["sampled_correct"] = sum(judged(row, ids)[1] for ids in completions[place, 1])
            sample["sampled"] = config.samples
        samples.append({**sample, "kind": kind(row)} if kind else sample)
    result = _result(samples, _compared(config))
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


def uid_of(prompt: list[int]) -> int:
    """What the noise of a prompt's samples is keyed by: the same in any element or order."""
    return int(durable.sha256_bytes(repr(prompt))[:16], 16)


def _compared(config: Config) -> Dict[str, Dict[str, Any]]:
    """The samples of the evaluation to compare with, by prompt."""
    if not config.compare_with:
        return {}
    lines = (Path(config.compare_with) / SAMPLES).read_text().splitlines()
    return {sample["prompt"]: sample for sample in map(json.loads, lines)}


def _result(samples: List[Dict[str, Any]], before: Mapping[str, Dict[str, Any]] = {}) -> dict[str, Any]:
    """Counts and accuracies, overall and, where known, of prompts seen and not seen in training and of each kind."""
    result: dict[str, Any] = {}
    groups = {"": samples}
    if any(sample["seen"] is not None for sample in samples):
        groups |= {f"{name}_": [s for s in samples if s["seen"] is wanted] for name, wanted in (("seen", True), ("unseen", False))}
    for kind in sorted({sample["kind"] for sample in samples if sample.get("kind")}):
        groups[f"{kind}_"] = [sample for sample in samples if sample.get("kind") == kind]
    for name, of in groups.items():
        correct = sum(sample["correct"] for sample in of)
        result[f"{name}prompts"] = len(of)
        result[f"{name}correct"] = correct
        result[f"{name}accuracy"] = correct / len(of) if of else None
        if of and "sampled" in of[0]:
            shares = [sample["sampled_correct"] / sample["sampled"] for sample in of]
            result[f"{name}sampled_accuracy"] = sum(shares) / len(shares)
            result[f"{name}sampled_error"] = standard_error(shares)
            gains = [
                share - before[sample["prompt"]]["sampled_correct"] / before[sample["prompt"]]["sampled"]
                for sample, share in zip(of, shares)
                if "sampled" in before.get(sample["prompt"], {})
            ]
            if gains:
                result[f"{name}gain"], result[f"{name}gain_error"] = sum(gains) / len(gains), standard_error(gains)
    return result


def _table(keep: Path, result: dict[str, Any], step: int) -> None:
    labels = {"": "all", "seen_": "seen in training", "unseen_": "not seen"}
    names = [name.removesuffix("prompts") for name in result if name.endswith("prompts")]
    columns, keys = ["prompts", "distinct", "correct", "greedy accuracy"], ["prompts", "correct", "accuracy"]
    for column, key in (("sampled", "sampled_accuracy"), ("± error", "sampled_error"), ("gain", "gain"), ("± error", "gain_error")):
        if key in result:
            columns, keys = [*columns, column], [*keys, key]
    rows_ = [[labels.get(name, name.rstrip("_").replace("_", " ")), *(result.get(name + key) for key in keys)] for name in names]
    write_table(keep, "accuracy", f"Accuracy at step {step}", columns, rows_)


def finish(config: Config, parts: List[Path], out: Path, keep: Path) -> dict[str, Any]:
    """Join the elements' samples, in element order, and their counts. One process."""
    from megatron_ext import model_folder

    samples = [json.loads(line) for part in parts for line in (part / SAMPLES).read_text().splitlines()]
    result = _result(samples, _compared(config))
    durable.write_file(out / SAMPLES, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    durable.write_json(out / RESULT, result)
    _table(keep, result, model_folder.open_folder(config.model).step)
    return result


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
