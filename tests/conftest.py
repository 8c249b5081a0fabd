"""Settings of every test: long trials only on request, no warnings that nobody here can act on; tables at the end."""

import os
import sys

import pytest
from hypothesis import settings

from tests.inputs import ORIGINS, Inputs

TABLES = pytest.StashKey[list[str]]()  # lines that tests want printed; left by a session's end
_SENT = "tables"

# No deadline: how long an example takes says how busy the machine is.
settings.register_profile("all", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("all")

# Python keeps what it compiles, whatever the shell around says: else each process of a test compiles all our modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(scope="session", params=ORIGINS)
def inputs(request):
    """Input files: those that ship with the tests, then the public ones."""
    return Inputs(request.param)


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: many trials of one fault; run with -m soak")
    config.addinivalue_line("markers", "rehearsal: the GPU path with stand-ins; run with -m rehearsal, as .ci/run does")
    config.addinivalue_line(
        "markers", "vllm: vLLM's CPU build, in its own environment; run with -m vllm, as .ci/run does"
    )
    config.addinivalue_line("markers", "releases: needs two releases of megatron-core; run as .ci/run does")
    for noise in (
        "ignore::FutureWarning:torch",
        "ignore::FutureWarning:megatron",
        "ignore::DeprecationWarning:megatron",
        "ignore::FutureWarning:megatron_ext",
        "ignore::UserWarning:megatron_ext",
    ):
        config.addinivalue_line("filterwarnings", noise)
    if not config.option.markexpr:
        config.option.markexpr = "not soak and not rehearsal and not releases and not vllm"
    config.option.loadscopereorder = False  # pytest-xdist's own order has the few long tests last, on one worker


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The quick start, which takes longest, first; then the files of all folders, evenly mixed, so that tests that
    wait for Slurm run beside tests that compute."""
    folders = {}
    for path in dict.fromkeys(item.path for item in items):
        folders.setdefault(path.parent, []).append(path)
    share = {path: place / len(files) for files in folders.values() for place, path in enumerate(files)}
    items.sort(key=lambda item: -1 if item.path.name == "test_tiny.py" else share[item.path])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """A worker of pytest-xdist prints nothing: the process that started it does."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_SENT] = session.config.stash.get(TABLES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash.setdefault(TABLES, []).extend(getattr(node, "workeroutput", {}).get(_SENT, []))


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(TABLES, []):
        terminalreporter.write_line(line)
