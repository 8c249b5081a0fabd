"""A user's project may have folders called jobs, slurm, launchers: ours run all the same, in every way in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.own_packages import PACKAGES
from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401
from tests.command import ROOT

PIPELINE = """
name: mine
phases:
  one: {uses: my_phases.count, array: 2}
  two: {uses: my_phases.count, resources: {ranks_per_node: 2}, needs: [one]}
"""
PHASE = """
from dataclasses import dataclass
import data_tools, jobs, launchers, megatron_ext, slurm
import my_helper

@dataclass
class Config:
    pass

def run(config, task):
    return {"places": [list(module.__path__)[0] for module in (data_tools, jobs, launchers, megatron_ext, slurm)],
            "help": my_helper.HELP}

def finish(parts, config, task):
    return {}
"""
ODD = """ -r' "#1 $HOME$(id)`id`é日,;[0-3]*?&|<>{b}=~!@^(+ """  # a run's name that shells, Slurm and rich could misread
SHADOW = (
    "import os\nopen({marker!r}, 'a').write(__file__)\nraise SystemExit('a module of the user ran in place of ours')\n"
)


@pytest.fixture
def project(tmp_path):
    """(folder of a project with a folder for each of our names, the file in which they would say that they ran)."""
    marker = tmp_path / "ran"
    folder = tmp_path / "project"
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        for module in ("__init__", "cli", "worker", "replay", "local", "rerun", "mistake"):
            (folder / name / f"{module}.py").write_text(SHADOW.format(marker=str(marker)))
    (folder / "my_phases").mkdir()
    (folder / "my_phases" / "__init__.py").write_text("")
    (folder / "my_phases" / "count.py").write_text(PHASE)
    (folder / "my_helper.py").write_text("HELP = 1\n")
    (folder / "mine.yaml").write_text(PIPELINE)
    yield folder
    assert not marker.exists(), marker.read_text()


def console(folder, *words, **env):
    """The console script as an installation has it, in a project that PYTHONPATH names."""
    site = folder.parent / "site"
    site.mkdir(exist_ok=True)
    if not (site / "afterok").exists():
        (site / "afterok").symlink_to(ROOT / "launchers" / "console")
    script = f"import sys; sys.path.append({str(site)!r}); from afterok.start import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *map(str, words)],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ".", **env},
        timeout=200,
    )


def code_of(run, phase):
    from jobs.artifacts.seal import read_seal

    seal = next((run / phase).glob("*/seals/0000.json"), None) or next((run / phase).glob("*/seal.json"))
    return {Path(place).parent.resolve() for place in read_seal(seal).facts["places"]}


def test_the_console_script_the_driver_the_worker_and_its_ranks_run_ours(project):
    run = f"{ODD}%a\\n"
    done = console(project, "run", "mine.yaml", f"--run={run}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        code_of(project / run, "one")
        == code_of(project / run, "two")
        == {(project / run / "submissions/1/code").resolve()}
    )
    replay = console(project, "logs", run, "one", "--replay", "0/0/0")
    assert replay.returncode == 2 and "is no grpo phase" in replay.stderr  # said by ours
    by_hand = subprocess.run(
        [sys.executable, "-P", "-m", "jobs.worker", run, "two"],
        cwd=project,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}."},
    )
    assert by_hand.returncode == 0 and "is sealed already" in by_hand.stdout, by_hand.stderr


def test_slurms_jobs_run_ours(project, dev_cluster):  # noqa: F811
    done = console(project, "run", "mine.yaml", f"--run={ODD}", **dev_cluster.env())
    run = project / ODD
    assert done.returncode == 0, done.stdout + done.stderr
    assert code_of(run, "one") == code_of(run, "two") == {(run / "submissions/1/code").resolve()}
    assert sorted(path.name for path in run.glob("one/logs/*")) == ["a1.0.out", "a1.1.out"]


@pytest.mark.parametrize(
    "program",
    [
        "jobs.worker",
        "jobs.replay",
        "jobs.bare",
        "launchers.door",
        "launchers.backends.local",
        "launchers.backends.restart",
        "launchers.cli",
        "megatron_ext.entrypoints.sft",
        "megatron_ext.entrypoints.evaluate",
    ],
)
def test_a_program_of_ours_takes_its_other_packages_from_beside_it(project, program):
    """As a user and torchrun start them, where the project has no folder of the program's own package."""
    shutil.rmtree(project / program.split(".")[0])
    words = ["x", "1"] if program == "launchers.backends.local" else ["--help"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", program, *words],
        cwd=project,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", str(ROOT)])},
    )
    told = "there is no submission" if program == "launchers.backends.local" else "usage:"
    assert told in done.stdout + done.stderr, done.stderr


def test_a_package_that_was_imported_from_elsewhere_is_refused_by_name(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "__init__.py").write_text("")
    script = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); import slurm; "
        f"runpy.run_path({str(ROOT / 'data_tools' / 'own_packages.py')!r})['hold']()"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"slurm was imported from {tmp_path / 'slurm'}" in done.stderr


def test_a_users_module_with_a_name_of_ours_is_told_so(project):
    (project / "mine.yaml").write_text(PIPELINE.replace("my_phases.count", "jobs.count"))
    done = console(project, "plan", "mine.yaml", "cluster=local")
    assert done.returncode == 2 and "jobs is a package of afterok itself" in done.stderr


def test_processes_that_a_program_of_ours_starts_import_ours_too(project):
    """Verifiers and multiprocessing's workers take the path of the process that starts them."""
    script = project / "mine.py"
    script.write_text(f"""
import multiprocessing, runpy
if __name__ == "__main__":
    runpy.run_path({str(ROOT / "data_tools" / "own_packages.py")!r})["hold"]()
    import data_tools.mistake
    from data_tools.tasks.rewards import _Process, Verifier
    process = _Process({{"calculator": Verifier("calculator", {{}}, {{}})}})
    print("verifiers", repr(process.mistake()))
    process.kill()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("spawned", pool.apply(data_tools.mistake.nearest, ("a", ["a"])))
""")
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=project,
        text=True,
        capture_output=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert "verifiers ''" in done.stdout and "did you mean a?" in done.stdout, done.stdout + done.stderr
