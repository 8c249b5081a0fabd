"""The equivalence certificate of a training: its parallel layout, made small, computes what one process computes.

A model of the same family and kinds of layers, with small sizes, is trained for one update on CPU ranks (gloo), each
parallel axis above 1 reduced to 2 and at most 8 ranks, and in one process: loss, gradients, and that a document of a
pack sees only itself. The certificate is kept by a key of all that it speaks of: the small model, the small layout,
and the code of this package with torch's and megatron-core's versions.

    torchrun --nproc-per-node N -m megatron_ext.entrypoints.certify --config FILE --out DIR
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_ext
from data_tools.base import durable, rendezvous
from data_tools.base.declared import setting
from data_tools.base.ports import PORTS
from data_tools.base.rendezvous_server import Server
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.models.registry import Family, model_type, read_config
from megatron_ext.parallel import shown
from megatron_ext.parallel.plan import ParallelPlan, Workload
from megatron_ext.parallel.rules import check as check_plan

MOST_RANKS = 8
TOLERANCE = 1e-5  # of fp32 numbers, relative
DOCUMENTS = ((64, 24, 8), (16, 40, 8, 24, 8))  # tokens; rows of 96
ALIGN = 8  # tokens, of these
VERSIONED = ("torch", "megatron-core")
CERTIFICATE = "certificate.json"
PATIENCE_S = 900.0

# Sizes of the small model, by the names that all families give them; what a model has none of stays 0.
SMALL = {
    "hidden": 32, "ffn": 48, "heads": 4, "head_dim": 8, "vocabulary": 61, "max_positions": 512, "window": 8,
    "experts": 4, "top_k": 2, "expert_ffn": 24, "shared_ffn": 24, "expert_groups": 1, "top_groups": 1,
    "mamba_heads": 8, "mamba_head_dim": 4, "mamba_groups": 4, "mamba_state": 8,
}  # fmt: skip


@dataclass
class Config:
    """A training whose parallel layout is certified."""

    model: str = setting("", "model folder", example="${phases.imported.out}", needed=True, input=True)
    ranks: int = setting(1, "ranks of the training", unit="ranks", least=1)
    parallel: ParallelPlan = setting(ParallelPlan, "how ranks share the model and the work")


def reduced(plan: ParallelPlan, ranks: int) -> tuple[ParallelPlan, int]:
    """Return the small layout and its ranks: every axis above 1 becomes 2, data parallelism where there is room for it.

    Transformer Engine's ring over context ranks has no like among the torch kernels: it becomes all_gather.
    """
    axes = ("tensor", "pipeline", "virtual", "context", "expert", "expert_tensor", "micro_batch")
    small = replace(plan, pipeline_layers=[], **{name: min(getattr(plan, name), 2) for name in axes})
    if plan.pipeline_layers:
        small.pipeline_layers = [1] * (small.stages - 1) + [2]
    if plan.context_comm == "p2p":
        small.context_comm = "all_gather"
    world = small.model
    if plan.data(ranks) > 1 and 2 * world <= MOST_RANKS:
        world *= 2
    return small, world


def shrunk(dims: Any, layers: int) -> Any:
    """Return the dimensions of a small model of the same family, with `layers` layers of all kinds that it has."""
    own = {field.name for field in fields(dims)}
    small: dict[str, Any] = {name: size for name, size in SMALL.items() if name in own and getattr(dims, name)}
    if dims.kv_groups:
        small["kv_groups"] = 4 if dims.kv_groups == dims.heads else min(dims.kv_groups, 2)
    kinds = {
        name: dict.fromkeys(getattr(dims, name)) for name in ("sliding", "no_rope", "dense", "pattern") if name in own
    }
    for name, each in kinds.items():  # a kind for each layer
        chosen = list(itertools.islice(itertools.cycle(each), layers))
        if name == "dense":
            chosen.sort(reverse=True)  # the layers without experts first, as all config.json can say
        small[name] = "".join(chosen) if name == "pattern" else tuple(chosen)
    if "layers" in own:
        small["layers"] = layers
    if "mxfp4" in own:
        small["mxfp4"] = False
    return replace(dims, dtype="float32", **small)


def _problem_of(config: Config) -> tuple[Family, Any, ParallelPlan, int]:
    """Return (family, small dimensions, small layout, its ranks). Raise UserMistake where the model is not known."""
    family, dims, problems = read_config(Path(config.model) / "hf")
    if problems or family is None:
        raise UserMistake(problems)
    plan, world = reduced(config.parallel, config.ranks)
    return family, shrunk(dims, sum(plan.pipeline_layers) or 4), plan, world


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED}


def _batch(plan: ParallelPlan, world: int) -> int:
    """Return the packs of an update: two rounds of the pipeline."""
    return 2 * plan.pipeline * plan.data(world) * plan.micro_batch


def check(config: Config, ranks: int) -> list[Problem]:
    """Return what can be refused before anything runs on `ranks` ranks."""
    if not (Path(config.model) / "hf" / "config.json").is_file():
        return [Problem("model", f"{config.model!r} is no model folder")]
    family, dims, plan, world = _problem_of(config)
    if ranks != world:
        return [Problem("", f"the small layout has {world} ranks, not {ranks}")]
    asked = Workload(
        world, family.config.shape(dims), pack_length=sum(DOCUMENTS[0]), align=ALIGN,
        global_batch=_batch(plan, world), gpus=False,
    )  # fmt: skip
    return check_plan(plan, asked)


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Measure on these ranks and, on rank 0, alone before. Rank 0 writes OUT/certificate.json.

    Return the facts: holds, versions (of torch and megatron-core), ranks, plan (degrees that are not 1), loss, gradient
    and norm (relative differences), tensor (whose gradient differs most), isolation (gradients, changes by document),
    releases (what the test suite found of the same under which megatron-core: parallel/shown.py).
    """
    from megatron_ext.parallel import ranks

    family, dims, plan, world = _problem_of(config)
    weights, first = out / "weights", ranks.rank_of_environment() == 0
    from megatron_ext.device import init_device

    init_device()
    from megatron_ext.training import certify  # megatron-core may be imported once the device is ready

    rows = [certify.random_pack(DOCUMENTS[i % len(DOCUMENTS)], dims.vocabulary, i) for i in range(_batch(plan, world))]
    if first:
        with _alone():
            with ranks.started(ParallelPlan()):
                certify.write_random_weights(family, dims, weights)
            serial = certify.measure(family, dims, ParallelPlan(), weights, packs=rows)
    with ranks.joined():  # where the others wait for rank 0
        together = certify.measure(family, dims, plan, weights, packs=rows)
        alone = certify.isolation(family, dims, plan, weights, lengths=DOCUMENTS[1], document=1)
    if not first:
        return {}
    difference, plain = certify.difference(together, serial), asdict(ParallelPlan())
    facts = {
        "holds": difference.largest <= TOLERANCE and alone.holds,
        "versions": _versions(),
        "ranks": world,
        "plan": {name: value for name, value in asdict(plan).items() if value != plain[name]},
        **asdict(difference),
        "isolation": asdict(alone),
        "releases": shown.of(shown.layout(plan, world), model_type(family, dims)),
    }
    durable.write_json(out / CERTIFICATE, facts)
    return facts


@contextmanager
def _alone() -> Iterator[None]:
    """Make this process no rank of a set inside the block."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before


# ---------------------------------------------------------------- made at need, from another process


def key_of(config: Config) -> str:
    """Return 16 hex digits that name all that a certificate is about: the small model and layout, and the code."""
    family, dims, plan, world = _problem_of(config)
    package = Path(megatron_ext.__file__).parent
    code = {str(path.relative_to(package)): durable.sha256_file(path) for path in sorted(package.rglob("*.py"))}
    material = {
        "family": family.name, "dims": repr(dims), "plan": asdict(plan), "ranks": world,
        "versions": _versions(), "code": code,
    }  # fmt: skip
    return durable.sha256_bytes(durable.canonical_json(material))[:16]


def certificate(config: Config, folder: Path) -> dict[str, Any]:
    """Return the facts of the certificate in `folder`, made now on CPU ranks of this machine where it does not exist.

    For one process. Raise UserMistake where the layout does not hold, or could not be run.
    """
    path = folder / f"{key_of(config)}.json"
    try:
        return durable.read_checked(path)
    except (FileNotFoundError, durable.TornFile):
        pass
    world = _problem_of(config)[-1]
    with tempfile.TemporaryDirectory() as work:
        facts = _spawn(config, Path(work), world)
    if not facts["holds"]:
        raise UserMistake(f"parallel: the layout does not compute what one process does: {json.dumps(facts)}")
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_checked(path, facts)
    return facts


def _spawn(config: Config, work: Path, world: int) -> dict[str, Any]:
    """Run `run` on `world` ranks of this machine, and return its facts."""
    file = work / "certify.yaml"
    file.write_text(json.dumps(asdict(config)))  # JSON is YAML
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    server = Server(rendezvous.Meeting("127.0.0.1", PORTS, str(work), os.urandom(32)))
    ours = {
        **rendezvous.to_environment(server.meeting, server.port), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_ext.entrypoints.certify", "--config", str(file), "--out"]
    ranks = [
        subprocess.Popen(
            [*command, str(work / "out")],
            env={**kept, **ours, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(work / f"{rank}.log").open("w"),
        )
        for rank in range(world)
    ]
    try:
        codes = [rank.wait(timeout=PATIENCE_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        server.close()
    if any(codes):
        said = [line for number in range(world) for line in (work / f"{number}.log").read_text().splitlines()[-1:]]
        where = f"parallel: the equivalence certificate could not be made on {world} ranks"
        raise UserMistake(f"{where}: {'; '.join(said)}")
    return durable.read_json(work / "out" / CERTIFICATE)


if __name__ == "__main__":
    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
