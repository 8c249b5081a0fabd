"""What a phase imports, read from its files: our own packages and the user's, never the rest of the house."""

import subprocess
import sys

import pytest

from jobs.kind import kind_names
from jobs.schema.imports import beside, closure
from launchers.planning.snapshot import find_code


def written(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {name: folder / name for name in files}


FILES = {
    "a/__init__.py": "", "a/b/__init__.py": "from . import c", "a/b/c.py": "import os", "a/b/d.py": "from ..e import f",
    "a/e.py": "def f():\n    import g.h", "g/__init__.py": "", "g/h.py": "", "g/i.py": "",
    "dyn.py": "import importlib\nimportlib.import_module(f'fam.{x}.y')", "fam/one/y.py": "", "fam/two/y.py": "",
    "z.py": "",
    "loop1.py": "import loop2", "loop2.py": "import loop1", "broken.py": "import (",
}  # fmt: skip


@pytest.mark.parametrize("name, expected", [
    ("a.b", {"a/__init__.py", "a/b/__init__.py", "a/b/c.py"}),
    ("a.b.d", {"a/__init__.py", "a/b/__init__.py", "a/b/c.py", "a/b/d.py", "a/e.py", "g/__init__.py", "g/h.py"}),
    ("dyn", {"dyn.py", "fam/one/y.py", "fam/two/y.py"}), ("loop1", {"loop1.py", "loop2.py"}), ("broken", {"broken.py"}),
    ("nothing", set()),
])  # fmt: skip
def test_imports_are_followed_wherever_they_stand(tmp_path, name, expected):
    assert closure([name], written(tmp_path, FILES)) == expected


OFTEN = ("pack", "grpo")


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.soak) for kind in kind_names()]
)
def test_what_a_phase_loads_of_ours_at_plan_is_among_what_it_imports(kind):
    """Python itself as the oracle: a fresh interpreter imports the phase file."""
    loaded = "(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', 0))"
    code = f"import jobs.phases.{kind}, sys; print(*{loaded})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    files = find_code().files
    found = closure([f"jobs.phases.{kind}"], files)
    assert {name for name, path in files.items() if str(path) in loaded} <= found
    assert not [name for name in found if name.startswith("launchers/")]
    assert [name for name in found if name.startswith("jobs/phases/")] in (
        [f"jobs/phases/{kind}.py", "jobs/phases/__init__.py"],
        ["jobs/phases/__init__.py", f"jobs/phases/{kind}.py"],
    )


def test_modules_beside_a_users_module_go_along_installed_ones_do_not(tmp_path, monkeypatch):
    written(
        tmp_path,
        {
            "mine/__init__.py": "",
            "mine/score.py": "import numpy, yaml, absent, jobs\nunused = 'a word'",
            "mine/split.py": "import os, \\\n    helper",
            "mine/late.py": "from importlib import import_module\n\nlater = import_module(\n    'later.x')",
            "later.py": "",
            "helper.py": "from tools.x import y",
            "tools/__init__.py": "",
            "tools/x.py": "y = 1",
            "unused.py": "",
            "yaml/notes.txt": "no package",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert beside(tmp_path / "mine") == [tmp_path / name for name in ("helper.py", "later.py", "tools")]
