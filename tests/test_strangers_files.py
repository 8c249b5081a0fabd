"""No code of ours unpickles or runs remote code but at one place."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for package in ("data_tools", "jobs", "launchers", "megatron_ext", "slurm")
    for path in sorted((ROOT / package).rglob("*.py"))
]
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLES = (
    "megatron_ext/files/pickles.py",
    "data_tools/base/compiled.py",  # numba's own format, in a folder of the user's that nobody else may write
    "data_tools/tasks/process.py",  # what the run writes into a socket of its own to the process of its verifiers
)
LOADS = {  # what unpickles within, and where it may be called
    "torch.load": (),
    "torch.jit.load": (),
    "torch.hub.load": (),
    "dist_checkpointing.load": ("megatron_ext/weights/loading.py",),
    "FileSystemReader": (),
    "CachedMetadataFileSystemReader": (),
    "PackageImporter": (),
    "read_pickle": (),
    "add_safe_globals": (),
}
WORTH_PARSING = re.compile("|".join([*UNPICKLING, *map(re.escape, LOADS), "allow_pickle", "from_pretrained"]))


def wrong(name: str, text: str) -> list[str]:
    """What a source file does that only pickles.py may, or nobody."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        if name not in PICKLES and {one.split(".")[0] for one in names} & UNPICKLING:
            found.append(f"{name}:{node.lineno} imports {names}")
        if not isinstance(node, ast.Call):
            continue
        function, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        for loader, allowed in LOADS.items():
            if (function == loader or function.endswith(f".{loader}")) and name not in allowed:
                found.append(f"{name}:{node.lineno} calls {function}")
        if "allow_pickle" in words:
            found.append(f"{name}:{node.lineno} passes allow_pickle")
        trust = words.get("trust_remote_code")
        if function.endswith("from_pretrained") and not (isinstance(trust, ast.Constant) and trust.value is False):
            found.append(f"{name}:{node.lineno} may run remote code")
    return found


def test_pickles_are_read_by_one_module_and_remote_code_by_none():
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
    worth = {name: text for name, text in texts.items() if WORTH_PARSING.search(text)}
    assert len(worth) > 5
    assert [one for name, text in worth.items() for one in wrong(name, text)] == []


def test_the_sweep_sees_each_way():
    for text in (
        "import pickle", "from pickle import loads", "import cloudpickle as c", "torch.load(f, weights_only=True)",
        "dist_checkpointing.load({}, d)", "FileSystemReader(d).read_metadata()", "numpy.load(f, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(n)", "AutoConfig.from_pretrained(n, trust_remote_code=True)",
        "AutoConfig.from_pretrained(n, trust_remote_code=given)", "torch.serialization.add_safe_globals([X])",
    ):  # fmt: skip
        assert WORTH_PARSING.search(text) and wrong("jobs/x.py", text), text
