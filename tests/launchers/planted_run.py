"""Plants a whole run on disk, as afterok's workers would have left it, without running anything.

What is planted is written by the owners of the formats where they are quick enough; outcomes of thousands of elements
are written without waiting for the disk.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.tables import write_table
from data_tools.records.balance import Balance, SourceBalance
from jobs.artifacts.layout import METRICS
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.artifacts.seal import FORMAT, manifest, read_seal

KEY = "0123456789abcdef"
START = 1_796_000_000.0  # when the first submission was sent, in seconds since the epoch
MINUTE = 60.0


class PlantedRun:
    """A run of local processes whose phases each need the one before, planted minute by minute."""

    def __init__(self, path: Path, phases: Mapping[str, str], elements: int = 1, gpus: int = 0, submissions: int = 1):
        self.run = RunFolder(path)
        self.phases: dict[str, FrozenPhase] = {}
        names = list(phases)
        for name, before in zip(names, [None, *names]):
            self.phases[name] = FrozenPhase(
                name=name, uses=phases[name], key=KEY, material={"settings": {}}, settings={"lr": 0.1}, array=None,
                elements=elements, fans_in=elements > 1, needs={before: "afterok"} if before else {}, inputs={},
                ranks_per_node=1, nodes=1, gpus_per_node=gpus,
            )  # fmt: skip
        self.tasks: list[dict[str, Any]] = []
        for number in range(1, submissions + 1):
            self.submit(number, names)

    def submit(self, number: int, names: Sequence[str], minute: float = 0.0) -> None:
        """Plant a submission that sends some of the phases."""
        self.run.submission_folder(number).mkdir(parents=True)
        self.run.freeze(number, "planted", list(self.phases.values()))
        self._tell(minute, event="submission", submission=number, backend="local", choice="local", cluster="local",
                   cluster_name="", profile="local", profile_file="", run=str(self.run.path))  # fmt: skip
        for place, name in enumerate(names):
            phase = self.phases[name]
            self._tell(minute, event="job", submission=number, phase=name, key=phase.key, job=f"{number}.{place}",
                       elements=list(range(phase.elements)), is_array=phase.elements > 1, name="", waits={}, request="",
                       batch=1, links=0, needs=phase.needs)  # fmt: skip
        self._tell(minute, event="released", submission=number)

    def _tell(self, minute: float, **told: Any) -> None:
        line = durable.canonical_json(durable.with_sum({"time": START + minute * MINUTE, **told}))
        with open(self.run.ledger, "a") as ledger:
            ledger.write(f"{line}\n")

    def life(self, name: str, first: float, last: float | None, state: str = "sealed", **told: Any) -> None:
        """Plant a life of an element from minute `first` to `last`; without a last it left no word."""
        element, attempt, restart = (told.pop(word, n) for word, n in (("element", 0), ("attempt", 1), ("restart", 0)))
        life = (element, attempt, restart)
        lease = self.run.artifact(self.phases[name]).leases_folder / f"{element:04d}.a{attempt}.r{restart}.g0"
        lease.parent.mkdir(parents=True, exist_ok=True)
        lease.touch()
        os.utime(lease, (START + first * MINUTE,) * 2)
        if last is None:
            return
        outcome = Outcome(
            *life, state, exit_code=int(state != "sealed"), message=told.pop("message", ""), host="n1", job="",
            started=START + first * MINUTE, ended=START + last * MINUTE, **told,
        )  # fmt: skip
        path = self.run.outcome_path(name, life, is_twin=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(durable.with_sum(dataclasses.asdict(outcome))))

    def log(self, name: str, text: str, attempt: int = 1) -> None:
        """Plant the log of element 0."""
        path = self.run.log_path(name, attempt, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def going(self, name: str, attempt: int = 1, element: int = 0, state: str = "RUNNING") -> None:
        """Have this very process be the driver that says that an element runs or waits."""
        job = f"{attempt}.{list(self.phases).index(name)}"
        task = {"phase": name, "job": job, "index": element, "state": state, "reason": "", "exit_code": None,
                "started": START, "ended": None, "restart": 0}  # fmt: skip
        self.tasks.append(task)
        path = self.run.local_folder(attempt) / "state.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_checked(path, {"driver": Owner.me(attempt, 0).__dict__, "tasks": self.tasks})

    def seal(self, name: str, minute: float, files: Mapping[str, str] = {}, **facts: Any) -> None:
        """Plant the seal of a phase; its content is what `files` say, and what it read the seals of its needs."""
        phase = self.phases[name]
        artifact = self.run.artifact(phase)
        root = artifact.folder / "work" / "0000.a1.r0.g0"
        root.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_text(text)
        upstream = {need: seal.digest for need in phase.needs if (seal := self.run.seal(need, KEY)) is not None}
        seal = {"format": FORMAT, "key": KEY, "material": {}, "root": "work/0000.a1.r0.g0", "files": manifest(root),
                "facts": facts, "upstream": upstream, "submission": 1, "restart": 0, "job": "",
                "started_at": START, "sealed_at": START + minute * MINUTE}  # fmt: skip
        artifact.seal_path.write_text(durable.canonical_json(durable.with_sum(seal)))
        assert read_seal(artifact.seal_path)

    def metrics(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Plant the metrics of element 0."""
        path = self.run.artifact(self.phases[name]).folder / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def samples(self, name: str, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Plant the log of the samples of one step."""
        path = self.run.artifact(self.phases[name]).folder / "samples" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"step": step, **line}) + "\n" for line in lines))


def balance_file(**dropped: int) -> dict[str, str]:
    """Return the balance sheet of 10 kept rows and the dropped ones, by its name."""
    source = SourceBalance.of_rows("rows", 10 + sum(dropped.values()))
    for bucket, rows in dropped.items():
        source.dropped[bucket] = rows
    for _ in range(10):
        source.keep(tokens=5, supervised=2)
    return {"balance.json": json.dumps(Balance([source]).to_json())}


def sample(item: int, number: int, reward: float | None = 0.0, **told: Any) -> dict[str, Any]:
    """Return a line of a samples' log."""
    line = {"item": item, "sample": number, "entry": "sums", "uid": f"sums/{item}", "prompt": f"{item}+1=", "note": "",
            "completion": str(item + 1), "tokens": 2, "finish": "stop", "reward": reward, "answer": None, "parts": {},
            "advantage": 0.5, "trained": True, "logprob_difference": {"mean": 1e-6, "max": 2e-6}}  # fmt: skip
    return line | told


def evaluation_files(right: int, prompts: int = 20) -> dict[str, str]:
    """Return the files of an evaluation of a task `sums`."""
    lines = [{"prompt": f"{n}+1=", "completion": "2", "said": "2", "correct": n < right, "seen": None, "kind": "sums"}
             for n in range(prompts)]  # fmt: skip
    result = {"records": {"sums": {"lines": prompts, "rows": prompts, "prompts": prompts}}}
    return {"samples.jsonl": "".join(json.dumps(line) + "\n" for line in lines), "result.json": json.dumps(result)}


def finished(path: Path, word: str = "plain") -> PlantedRun:
    """Plant a finished run of data, training, GRPO and evaluations, with `word` wherever a run may hold any text."""
    planted = PlantedRun(path, {"data": "materialize", "sft": "sft", "grpo": "grpo", "before": "evaluate",
                                "after": "evaluate"}, gpus=2)  # fmt: skip
    for place, name in enumerate(planted.phases):
        planted.life(name, first=2 + 10 * place, last=9 + 10 * place)
    planted.seal("data", 9, {**balance_file(**{word: 3, "duplicate": 2}), "x": word}, headline=word)
    write_table(planted.run.artifact(planted.phases["data"]).folder, "balance", word, [word, "rows"], [[word, 15]])
    steps = range(1, 41)
    planted.metrics("sft", [{"step": n, "loss": 3 / n, "step_s": 2.0, word: {"deep": n}} for n in steps])
    planted.seal("sft", 19, {"weights": "w"}, headline="loss 3 → 0.1", weights_digest="5" * 64)
    difference = {"mismatch": {"kl": 1e-7, "ess": 0.999}}
    planted.metrics("grpo", [{"step": n, "reward": n / 40, "step_s": 4.0, **difference} for n in steps])
    for step in steps:
        planted.samples("grpo", step, [
            sample(1, 0, 1.0, completion=word, answer=word), sample(1, 1, 0.0, prompt=word, advantage=-0.5),
            sample(2, 0, None, trained=False, advantage=None, note=f"no verdict {word}"),
            sample(2, 1, 0.0, trained=False, advantage=None, finish="length"),
            *(sample(3, n, 1.0, trained=False, advantage=None, uid=word, entry=word) for n in range(2)),
        ])  # fmt: skip
    planted.seal("grpo", 29, {"weights": "w2"})
    planted.seal("before", 39, evaluation_files(5))
    planted.seal("after", 49, evaluation_files(15))
    return planted


def failed(path: Path, word: str = "plain") -> PlantedRun:
    """Plant a run whose training was preempted once, stopped at a checkpoint, and then failed."""
    planted = PlantedRun(path, {"data": "materialize", "sft": "sft", "after": "evaluate"})
    planted.life("data", 1, 5)
    planted.seal("data", 5, balance_file())
    planted.life("sft", 7, 17, "stopped", done=100, total=400, message="asked to stop")
    planted.life("sft", 27, 30, "failed", restart=1, message=f"ValueError: {word}")
    planted.log("sft", f"sft[0] attempt 1\nTraceback (most recent call last):\nValueError: {word}\n")
    return planted


def in_progress(path: Path, word: str = "plain") -> PlantedRun:
    """Plant a run whose training goes on while the evaluation waits for it."""
    planted = PlantedRun(path, {"data": "materialize", "sft": "sft", "after": "evaluate"})
    planted.life("data", 1, 5)
    planted.seal("data", 5, balance_file(), headline=word)
    planted.life("sft", 7, None)
    planted.metrics("sft", [{"step": n, "loss": 3 / n} for n in range(1, 6)])
    planted.going("sft")
    planted.going("after", state="PENDING")
    return planted


def large(path: Path, phases: int = 10, elements: int = 2000, steps: int = 5000) -> PlantedRun:
    """Plant a finished run of many phases of many elements, some restarted, with long metrics."""
    names = {f"phase{n}": "materialize" for n in range(phases - 2)} | {"sft": "sft", "grpo": "grpo"}
    planted = PlantedRun(path, names, elements=elements, gpus=1)
    for place, name in enumerate(names):
        for element in range(elements):
            begin = 60.0 * place + 2 + 40 * element / elements
            if element % 50 == 0:
                planted.life(name, begin, begin + 3, "failed", element=element, message="CUDA error: out of memory")
            restart = int(element % 50 == 0)
            planted.life(name, begin + 4 * restart, begin + 8, element=element, restart=restart)
        planted.seal(name, 60.0 * place + 59, balance_file(duplicate=5))
    line = {f"metric{n}": 0.5 for n in range(30)} | {"step_s": 1.0, "reward": 0.1, "mismatch": {"kl": 1e-6}}
    for name in ("sft", "grpo"):
        for element in range(0, elements, 100):
            keep = planted.run.artifact(planted.phases[name]).keep_folder(element, elements)
            keep.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps({"step": n, "loss": 3 / n + element, **line}) + "\n" for n in range(1, steps))
            (keep / METRICS).write_text(text)
    keep = planted.run.artifact(planted.phases["grpo"]).keep_folder(0, elements)
    (keep / "samples").mkdir(parents=True)
    for step in range(1, 101):
        lines = [sample(item, n, prompt="p" * 4000, completion="c" * 8000) for item in range(16) for n in range(16)]
        text = "".join(json.dumps({"step": step, **each}) + "\n" for each in lines)
        (keep / "samples" / f"step_{step:06d}.jsonl").write_text(text)
    return planted
