import pytest

from megatron_ext.device import init_device
from tests.megatron_ext.gloo import Ranks

init_device()  # before any test module imports megatron-core


@pytest.fixture(scope="session")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def alone():
    """This process as the only rank."""
    from megatron_ext import ranks
    from megatron_ext.parallel import ParallelPlan

    with ranks.started(ParallelPlan(), seed=1):
        yield
