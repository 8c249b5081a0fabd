"""A planted secret reaches the phase and is nowhere else: not in the run, nor in what Slurm keeps, nor in `ps`."""

import hashlib
import json
import secrets
import subprocess
from pathlib import Path

import pytest

from jobs.artifacts.run_folder import RunFolder
from launchers.backends.local import LocalBackend, driver_is_alive
from launchers.planning.ledger import Ledger
from tests.command import afterok, afterok_json, one_line, wait_for

PIPELINE = """
name: secretive
phases:
  use: {uses: tests.toy.secretive, with: {variables: [FROM_FILE, FROM_COMMAND]}}
"""
SLURM_PROFILE = """
partitions: {batch: {}}
roles: {cpu: {partition: batch, time: "10"}, train: {}, generate: {}, eval: {}}
"""
LOCAL_PROFILE = "kind: local\nroles: {cpu: {}}\n"


class Planted:
    """Values made up now, so that no source file, and no snapshot of one, has them."""

    def __init__(self, folder: Path):
        self.values = {name: f"planted-{secrets.token_hex(12)}" for name in ("FROM_FILE", "FROM_COMMAND", "FORWARDED")}
        self.file, self.other, self.runs = folder / "key", folder / "other_key", folder / "runs_of_the_command"
        for path, name in ((self.file, "FROM_FILE"), (self.other, "FROM_COMMAND")):
            path.touch(0o600)
            path.write_text(self.values[name] + "\n")
        self.pipeline = folder / "secretive.yaml"
        self.pipeline.write_text(PIPELINE)
        self.run = folder / "run"

    def profile(self, folder: Path, base: str, env: str = "") -> str:
        path = folder / "site.yaml"
        references = f"{{FROM_FILE: 'file:{self.file}', FROM_COMMAND: 'cmd:echo >> {self.runs}; cat {self.other}'}}"
        path.write_text(f"{base}env:\n  secrets: {references}\n{env}")
        return f"cluster={path}"

    def found_in(self, text: bytes | str) -> set[str]:
        data = text.encode() if isinstance(text, str) else text
        return {name for name, value in self.values.items() if value.encode() in data}

    def found_below(self, folder: Path) -> dict[str, set[str]]:
        """{file: which values} of everything below a folder that can be read."""
        found = {}
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                names = self.found_in(path.read_bytes())
                if names:
                    found[str(path.relative_to(folder))] = names
        return found

    def used(self, *names: str) -> bool:
        digests = next(self.run.glob("use/*/work/*/digests.txt")).read_text().split()
        return digests == [hashlib.sha256(self.values[name].encode()).hexdigest() for name in names]


@pytest.fixture
def planted(tmp_path):
    (tmp_path / "keys").mkdir()
    return Planted(tmp_path / "keys")


def in_any_process(planted: Planted) -> set[str]:
    """Values in the command line or environment of any process, this one's own children of the moment included."""
    found = planted.found_in(subprocess.run(["ps", "axeww"], capture_output=True).stdout)
    for folder in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                found |= planted.found_in((folder / name).read_bytes())
            except OSError:  # it ended, or is another user's
                continue
    return found


def test_a_value_is_used_but_in_no_file_of_the_run_whatever_the_phase_does_with_it(planted, tmp_path):
    cluster = planted.profile(tmp_path, LOCAL_PROFILE)
    done = afterok("run", planted.pipeline, cluster, "use.with.leak=error", "--run", planted.run, check=1)
    log = (planted.run / "use/logs/a1.0.out").read_text()
    assert "Traceback" in log and "?key=***FROM_FILE***" in log and "401 Unauthorized" in done.stderr
    assert "***FROM_FILE***" in RunFolder(planted.run).outcomes("use")[0].message
    assert not planted.found_in(done.stdout + done.stderr)
    done = afterok("run", planted.pipeline, cluster, "use.with.leak=mistake", "--run", planted.run, check=2)
    assert "key ***FROM_FILE*** is refused" in one_line(done)
    afterok("run", planted.pipeline, cluster, "use.with.leak=print", "--run", planted.run)
    assert "***FROM_COMMAND***" in (planted.run / "use/logs/a3.0.out").read_text()
    assert planted.used("FROM_FILE", "FROM_COMMAND")
    # A run is over once all is sealed, and its driver a moment later.
    state = LocalBackend(RunFolder(planted.run))._state("3")
    wait_for("the driver's end", lambda: not driver_is_alive(state), 60)
    next(planted.run.glob("use/*/seal.json")).unlink()
    done = afterok("run", planted.pipeline, cluster, "use.with.leak=facts", "--run", planted.run, check=2)
    assert "use: facts" in one_line(done) and "would write down the value of the secret FROM_FILE" in one_line(done)
    assert planted.found_below(planted.run) == {}
    assert str(planted.file) in (planted.run / "submissions/1/profile.yaml").read_text()  # the reference is kept


def test_a_secret_that_cannot_be_read_is_one_line_and_exit_2(planted, tmp_path):
    cluster = planted.profile(tmp_path, LOCAL_PROFILE)
    planted.file.chmod(0o644)
    done = afterok("run", planted.pipeline, cluster, "--run", planted.run, check=2)
    assert f"chmod 600 {planted.file}" in one_line(done)
    assert "Traceback" not in (planted.run / "use/logs/a1.0.out").read_text()
    assert planted.found_below(planted.run) == {} and not list(planted.run.glob("use/*/seal.json"))


def test_a_forwarded_variable_that_is_not_set_is_refused_before_anything_queues(planted, tmp_path):
    cluster = planted.profile(tmp_path, LOCAL_PROFILE, "  forward: [FORWARDED]\n").replace("cluster=", "")
    text = Path(cluster).read_text().replace("secrets: {", "secrets: {FORWARDED: 'env:FORWARDED', ")
    Path(cluster).write_text(text)
    line = one_line(afterok("submit", planted.pipeline, f"cluster={cluster}", "--run", planted.run, check=2))
    assert "FORWARDED is not set" in line and not planted.run.exists()


def test_on_slurm_a_planted_secret_is_nowhere_and_a_forwarded_variable_is_where_we_say(
    planted, tmp_path, accounted_cluster
):
    """Below the cluster's prefix lie the controller's state, the nodes' spool, all logs and slurmdbd's database."""
    env = accounted_cluster.env() | {"FORWARDED": planted.values["FORWARDED"]}
    path = planted.profile(tmp_path, SLURM_PROFILE, "  forward: [FORWARDED]\n")
    profile = Path(path.removeprefix("cluster="))
    profile.write_text(profile.read_text().replace("secrets: {", "secrets: {FORWARDED: 'env:FORWARDED', "))
    wanted = [path, "use.with.variables=[FROM_FILE,FROM_COMMAND,FORWARDED]", "use.with.leak=print"]
    wanted += ["use.with.seconds=60", "use.resources.ranks_per_node=2", "--run", planted.run]
    plan = afterok("plan", planted.pipeline, *wanted, env=env)
    assert "forwarded from your environment into the jobs': FORWARDED" in plan.stderr
    submitted = afterok("submit", planted.pipeline, *wanted, env=env)
    assert "warning: FORWARDED will not stay secret" in submitted.stderr
    job = Ledger(planted.run / "ledger.jsonl").jobs()[0].job
    log = planted.run / "use/logs/a1.0.out"
    wait_for("both ranks to hold the values", lambda: log.exists() and log.read_text().count("the environment:") == 2)

    def slurm(*command):
        return subprocess.run(command, env=accounted_cluster.env(), capture_output=True, text=True, check=True).stdout

    assert in_any_process(planted) <= {"FORWARDED"}
    shown = slurm("scontrol", "show", "job", "-dd", job)
    assert "JobState=RUNNING" in shown and not planted.found_in(shown)
    script = slurm("scontrol", "write", "batch_script", job, "-")
    assert "--export=FORWARDED" in script and not planted.found_in(script)
    variables = wait_for("slurmdbd", lambda: (said := slurm("sacct", "--env-vars", "--jobs", job)).count("=") and said)
    assert planted.found_in(variables) == {"FORWARDED"}
    assert not planted.found_in(
        slurm("sacct", "--batch-script", "--jobs", job) + slurm("sacct", "--jobs", job, "--format=ALL")
    )
    kept = planted.found_below(accounted_cluster.prefix)
    assert set().union(*kept.values()) <= {"FORWARDED"}, kept
    # What the profile's documentation says of forwarding, and why `env:` is not called a secret; it also shows that
    # this search finds what is there.
    assert {"state", "mysql"} <= {name.split("/")[0] for name in kept}, kept

    next(planted.run.glob("use/*/leases")).with_name("enough").touch()
    wait_for("the seal", lambda: list(planted.run.glob("use/*/seal.json")))
    assert planted.used("FROM_FILE", "FROM_COMMAND", "FORWARDED")
    assert planted.found_below(planted.run) == {} and "native: ['***FROM_FILE***'" in log.read_text()
    assert planted.runs.read_text() == "\n"  # once for both ranks
    told = json.loads(next(planted.run.glob("use/*/leases/0000.a1.r0.g0")).read_text())["environment"]
    assert told["SLURM_JOB_ID"] == job and told["SLURM_NTASKS"] == "2"
    assert all(name.startswith("SLURM") for name in told)


def test_on_slurm_an_unreadable_secret_is_named_by_status(planted, tmp_path, dev_cluster):
    env = dev_cluster.env()
    cluster = planted.profile(tmp_path, SLURM_PROFILE)
    planted.other.unlink()
    done = afterok("run", planted.pipeline, cluster, "--run", planted.run, env=env, check=2)
    assert f"cat {planted.other}`" in done.stderr and "exit code 1" in done.stderr
    assert afterok_json("status", planted.run, env=env)["phases"][0]["exit_code"] == 2
    assert planted.found_below(planted.run) == {} and planted.found_below(dev_cluster.prefix) == {}


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_roles_own_variables_and_secrets_reach_its_phases_and_no_other(tmp_path, cluster, dev_cluster):
    """Of two phases the one whose role has another environment sees another value and another secret."""
    for name in ("ours", "theirs"):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(f"secret of {name}\n")
    pipeline, run = tmp_path / "two.yaml", tmp_path / "run"
    phase = "{uses: tests.toy.secretive, with: {variables: [MODE, KEY]}, resources: {role: ROLE}}"
    pipeline.write_text(
        f"name: two\nphases:\n  a: {phase.replace('ROLE', 'cpu')}\n  b: {phase.replace('ROLE', 'train')}\n"
    )
    base = SLURM_PROFILE.partition("roles")[0] if cluster == "slurm" else "kind: local\n"
    own = f"{{set: {{MODE: theirs}}, secrets: {{KEY: 'file:{tmp_path}/theirs'}}}}"
    (tmp_path / "site.yaml").write_text(
        f"{base}roles: {{cpu: {{}}, train: {{env: {own}}}}}\n"
        f"env: {{set: {{MODE: ours}}, secrets: {{KEY: 'file:{tmp_path}/ours'}}}}\n"
    )
    env = {"SLURM_CONF": str(dev_cluster.conf)} if cluster == "slurm" else {}
    afterok("run", pipeline, f"cluster={tmp_path / 'site.yaml'}", "--run", run, env=env)
    for phase_name, whose in (("a", "ours"), ("b", "theirs")):
        (found,) = run.glob(f"{phase_name}/*/work/*/digests.txt")
        expected = [hashlib.sha256(value.encode()).hexdigest() for value in (whose, f"secret of {whose}")]
        assert found.read_text().split() == expected
