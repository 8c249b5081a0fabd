import gc
from pathlib import Path

import pytest

from megatron_ext import versions
from megatron_ext.device import init_device
from tests.conftest import TABLES
from tests.megatron_ext.gloo import Ranks, settle
from tests.megatron_ext.table import Table

init_device()  # before any test module imports megatron-core

COMPARED = "relative differences of loss, gradient and loss after an update"
TABLE = Table(f"Parallel equals serial, megatron-core {versions.installed()}: {COMPARED}")


@pytest.fixture(scope="session")
def table():
    return TABLE


def pytest_sessionfinish(session):
    session.config.stash.setdefault(TABLES, []).extend(TABLE.lines())


def _pool(world_size: int):
    ranks = Ranks(world_size)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks():
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks():
    yield from _pool(4)


@pytest.fixture
def alone():
    """This process as the only rank."""
    from megatron_ext.parallel import ranks
    from megatron_ext.parallel.plan import ParallelPlan

    settle()
    with ranks.started(ParallelPlan(), seed=1):
        yield
    gc.collect()  # as the pool of ranks does (gloo.py)


@pytest.fixture(scope="session")
def calculator(tmp_path_factory) -> dict[str, Path]:
    """Model folder, token store and packs of a tiny calculator run, made by the real phases; nobody writes there."""
    from data_tools.packs import materialize, pack
    from data_tools.tasks.task import Source
    from megatron_ext.entrypoints import import_hf, init_model

    root = tmp_path_factory.mktemp("calculator")
    folder = {name: root / name for name in ("hf", "part", "store", "packs", "base")}
    for path in folder.values():
        path.mkdir()
    init_model.run(init_model.Config(alphabet_task="calculator", hidden=32, ffn=48, layers=2), folder["hf"], root)
    rows = materialize.Config(task="calculator", source=Source(synthetic_rows=600), tokenizer=str(folder["hf"]))
    materialize.materialize(rows, folder["part"], 0, 1)
    materialize.finish(rows, [folder["part"]], folder["store"])
    pack.pack(pack.Config(store=str(folder["store"]), pack_length=64), folder["packs"])
    import_hf.run(import_hf.Config(str(folder["hf"])), folder["base"], root)
    return folder
