"""The code that a submission copies: what Python runs and git tracks, no more open than its source, and bounded."""

import json
import os
import stat
import subprocess

import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake
from launchers.planning import snapshot
from launchers.planning.snapshot import MOST_BYTES, find_code, take_snapshot


@pytest.fixture(params=["git", "no git"])
def package(request, tmp_path, monkeypatch):
    """A user's package that holds what people leave in theirs; tests/__init__ of pytest's own git is none of it."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "project" / "mine"
    for name, mode in (
        ("__init__.py", 0o644),
        ("rewards.py", 0o755),
        ("private.py", 0o600),
        ("sub/deep.py", 0o640),
        ("prompts.yaml", 0o600),
        ("notes.md", 0o644),
        ("credentials.json", 0o600),
        (".env", 0o600),
        (".venv/lib/x.py", 0o644),
        ("env/pyvenv.cfg", 0o644),
        ("env/lib/x.py", 0o644),
        ("__pycache__/x.py", 0o644),
        ("node_modules/x.json", 0o644),
        (".cache/x.json", 0o644),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
        path.chmod(mode)
    (root / "same.py").symlink_to("rewards.py")
    (root / "shadow").symlink_to("/etc/shadow")
    (root / "outside.json").symlink_to("/etc/passwd")
    (root / "elsewhere").symlink_to("/etc")
    os.mkfifo(root / "fifo.py")
    if request.param == "git":
        git = ["git", "-C", str(root.parent), "-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run(
            [*git, "add", "mine/__init__.py", "mine/prompts.yaml", "mine/notes.md", "mine/outside.json"], check=True
        )
    return request.param, root


CODE = {
    "mine/__init__.py",
    "mine/rewards.py",
    "mine/private.py",
    "mine/sub/deep.py",
    "mine/same.py",
    "mine/prompts.yaml",
}


def test_a_snapshot_holds_code_alone_with_its_modes_and_digests(package, tmp_path):
    way, root = package
    old = os.umask(0o022)
    try:
        take_snapshot(tmp_path / "code", tmp_path / "copies", [root])
    finally:
        os.umask(old)
    mine = {
        str(path.relative_to(tmp_path / "code"))
        for path in (tmp_path / "code" / "mine").rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    assert mine == CODE | ({"mine/notes.md"} if way == "git" else {"mine/credentials.json"})
    said = json.loads((tmp_path / "code.json").read_text())
    for name in mine:
        source, copy = root.parent / name, tmp_path / "code" / name
        assert stat.S_IMODE(copy.lstat().st_mode) == stat.S_IMODE(source.lstat().st_mode), name
        if not copy.is_symlink():
            assert said["files"][name] == durable.sha256_file(copy) == durable.sha256_file(source)
    assert os.readlink(tmp_path / "code" / "mine" / "same.py") == "rewards.py"
    assert "mine/outside.json" in said["left_out"]
    assert ("mine/credentials.json" in said["left_out"]) == (way == "git")


def test_submissions_of_the_same_code_share_one_copy_and_an_edited_one_is_nobodys_but_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "PACKAGES", ())
    mine, shared = tmp_path / "mine.py", tmp_path / "copies"
    mine.write_text("x = 1\n")

    def taken(number):
        folder = tmp_path / str(number) / "code"
        folder.parent.mkdir()
        take_snapshot(folder, shared, [mine])
        assert (folder / "mine.py").read_bytes() == mine.read_bytes()
        return folder.resolve()

    first = taken(1)
    assert taken(2) == first and list(shared.iterdir()) == [first]
    mine.chmod(0o600)  # the copy for all who may read would be more open than its source
    closed = taken(3)
    assert closed != first and stat.S_IMODE((closed / "mine.py").stat().st_mode) == 0o600
    mine.chmod(0o644), mine.write_text("x = 2\n")
    fourth = taken(4)
    assert fourth not in (first, closed)
    (first / "mine.py").write_text("x = 3  # by hand, for the jobs of before\n")
    mine.write_text("x = 1\n")
    assert taken(5) != first and len(list(shared.iterdir())) == 4
    mine.write_text("x = 2\n"), (fourth / "torch.py").touch()  # shadows another module
    assert taken(6) != fourth


def test_python_that_is_a_link_out_of_its_package_is_refused(package):
    _, root = package
    (root / "stolen.py").symlink_to("/etc/shadow")
    with pytest.raises(UserMistake, match="stolen.py: is a link to /etc/shadow"):
        find_code([root])


def test_more_than_a_bound_is_refused_and_the_largest_named(package):
    way, root = package
    for name, size in (("large.json", MOST_BYTES), ("larger.json", MOST_BYTES + 1)):
        with open(root / name, "wb") as file:
            file.truncate(size)
        if way == "git":
            subprocess.run(["git", "-C", str(root), "add", "-N", name], check=True)
    with pytest.raises(UserMistake, match=r"larger.json: 64.0 MiB, the largest of .* the most is 64.0 MiB"):
        find_code([root])


def test_our_own_code_and_its_data_are_whole():
    files = find_code().files
    for name in (
        "jobs/worker.py",
        "data_tools/own_packages.py",
        "jobs/pipelines/tiny.yaml",
        "slurm/profiles/example.yaml",
    ):
        assert name in files
    assert not [name for name in files if name.endswith(".pyc")]
