import gc

import pytest

from megatron_ext.device import init_device
from tests.conftest import TABLES
from tests.megatron_ext.gloo import Ranks
from tests.megatron_ext.table import Table

init_device()  # before any test module imports megatron-core

TABLE = Table("Parallel equals serial: relative differences of loss, gradient and loss after an update")


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
    from megatron_ext import ranks
    from megatron_ext.parallel import ParallelPlan

    with ranks.started(ParallelPlan(), seed=1):
        yield
    gc.collect()  # as the pool of ranks does (gloo.py)
