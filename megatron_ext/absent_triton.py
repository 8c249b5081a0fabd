"""A machine without Triton, for a release of megatron-core that imports it whether it is there or not.

Triton is a gigabyte, and no CPU can use it. The one module that asks for it (versions.py, `needs_triton`) is run beside
a stand-in, which nobody else sees: what asks whether Triton is there is told the truth.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class _Kernel:
    """Stands for all that Triton has, in a module whose kernels no CPU runs."""

    def __getattr__(self, name: str) -> "_Kernel":
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Kernel":
        return self


class _Loader(importlib.abc.Loader):
    """Runs a module of megatron-core as its own loader does, beside a Triton that stands for none."""

    def __init__(self, own: Any):
        self._own = own

    def create_module(self, spec: Any) -> Any:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        names = ("triton", "triton.language")
        stand_ins = {name: ModuleType(name) for name in names}
        for each in stand_ins.values():
            each.__getattr__ = _Kernel().__getattr__  # type: ignore[method-assign]  # of the module (PEP 562)
        stand_ins["triton"].language = stand_ins["triton.language"]  # type: ignore[attr-defined]
        sys.modules.update(stand_ins)
        try:
            self._own.exec_module(module)
        finally:
            for name in names:
                del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, as Python does, and has `_Loader` run it."""

    def __init__(self, name: str):
        self._name = name

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == self._name else None
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


@contextlib.contextmanager
def allowed(module: str) -> Iterator[None]:
    """Let megatron-core's `module`, "" for none, import a Triton that is not installed: a gigabyte no CPU can use."""
    if not module or importlib.util.find_spec("triton") is not None:
        yield
        return
    finder = _Finder(f"megatron.core.{module}")
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
