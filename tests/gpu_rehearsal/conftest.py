import pytest

from megatron_ext.device import init_device

init_device()  # before any test module imports megatron-core

from tests.gpu_rehearsal.pool import RehearsalRanks  # noqa: E402


def _pool(world_size: int):
    ranks = RehearsalRanks(world_size)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def solo():
    """One rank with the stand-ins."""
    yield from _pool(1)


@pytest.fixture(scope="session")
def pair():
    """Two ranks with the stand-ins."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def four():
    """Four ranks with the stand-ins."""
    yield from _pool(4)
