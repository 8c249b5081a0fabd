"""The cases and seconds of every sweep are told at the end."""

import pytest

from tests.conftest import TABLES


@pytest.fixture
def record(request):
    """Tells what a sweep met, with the session's other tables."""

    def keep(name: str, told: object) -> None:
        request.config.stash.setdefault(TABLES, []).append(f"door {name}: {told}")

    return keep
