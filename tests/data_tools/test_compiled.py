"""compiled.py: one compilation for all copies of a source, another for another source, and never wrong code."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SOURCE = """
from data_tools.base.compiled import compiled

@compiled()
def doubled(number):
    return 2 * number

def times(factor):
    @compiled()
    def multiplied(number):
        return factor * number
    return multiplied
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/afterok/compiled"


def copy(folder: Path, source: str = SOURCE) -> Any:
    """A module of this source in a folder of its own, as a submission's copy of it is."""
    folder.mkdir()
    (folder / "kernels.py").write_text(source)
    spec = importlib.util.spec_from_file_location("kernels", folder / "kernels.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def was_found(dispatcher: Any) -> bool:
    return bool(dispatcher.stats.cache_hits) and not dispatcher.stats.cache_misses


def test_a_copy_of_a_source_finds_what_another_compiled(tmp_path: Path, cache: Path) -> None:
    first, second = copy(tmp_path / "a"), copy(tmp_path / "b")
    assert first.doubled(21) == 42 and not was_found(first.doubled)
    assert second.doubled(21) == 42 and was_found(second.doubled)
    assert second.doubled(1.5) == 3.0 and second.doubled.stats.cache_misses  # another signature
    changed = copy(tmp_path / "c", SOURCE.replace("2 * number", "3 * number"))
    assert changed.doubled(21) == 63 and not was_found(changed.doubled)
    assert [first.times(factor)(2) for factor in (3, 5)] == [second.times(factor)(2) for factor in (3, 5)] == [6, 10]
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("harm", ["torn", "open to others", "unwritable"])
def test_a_cache_that_is_of_no_use_is_no_error_and_is_not_believed(tmp_path: Path, cache: Path, harm: str) -> None:
    if harm == "unwritable":
        cache.parent.mkdir(parents=True)
        cache.write_text("a file where the folder should be")
    assert copy(tmp_path / "a").doubled(21) == 42
    if harm == "torn":
        (path,) = cache.iterdir()
        path.write_bytes(path.read_bytes()[:100])
    elif harm == "open to others":
        cache.chmod(0o777)
    again = copy(tmp_path / "b")
    assert again.doubled(21) == 42 and not was_found(again.doubled)
