"""What sites do differently: refusals in words of their own, two clusters on one filesystem, profiles by their
cluster's name, other people's job names, controllers that hang."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.cli import main
from launchers.planning.ledger import Ledger
from slurm.client import Slurm
from tests.cluster import cluster_for_a_while, require_packages
from tests.command import ROOT, one_line, wait_for, write_toy

SITE_LUA = """
function slurm_job_submit(job, partitions, uid)
  local said = {[7] = "No account given. Choose one of yours with --account and try again.",
                [8] = "Dear user,\\nplease say --gres=gpu:TYPE:N\\ninstead.",
                [9] = "Socket timed out on send/recv operation: your job needs a timeout handler "
                      .. "(communication of May)."}
  if said[job.time_limit] then slurm.log_user(said[job.time_limit]) return slurm.ERROR end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""
REFUSED = {
    7: "Choose one of yours with --account and try again.",
    8: "please say --gres=gpu:TYPE:N instead.",
    9: "needs a timeout handler (communication of May).",
}
PROFILE = """\
meta: {contact: help@bigsite.example}
partitions: {batch: {max_nodes: 1}}
roles: {cpu: {partition: batch, time: "10"}, train: {partition: batch, nodes: 1}}
"""


@pytest.fixture(scope="module")
def big_site(scrub_slurm):
    """A cluster called BigSite in its slurm.conf, which refuses jobs of 7, 8 and 9 minutes in words of its own."""
    require_packages()
    from slurm.dev import config as devconfig

    def with_lua(prefix, *args, **named):
        (prefix / "etc" / "job_submit.lua").write_text(SITE_LUA)
        return written(prefix, *args, **named)

    written, devconfig.slurm_conf = devconfig.slurm_conf, with_lua
    try:
        with cluster_for_a_while(
            nodes=1, gpus_per_node=0, settings={"ClusterName": "BigSite", "JobSubmitPlugins": "lua"}
        ) as cluster:
            yield cluster
    finally:
        devconfig.slurm_conf = written


@pytest.fixture(scope="module")
def other_site(scrub_slurm):
    require_packages()
    with cluster_for_a_while(nodes=1, gpus_per_node=0, settings={"ClusterName": "beta"}) as cluster:
        yield cluster


@pytest.fixture
def site(tmp_path, big_site):
    """(pipeline, run, env) of BigSite, as its users have it: SLURM_CONF, and a profile in the site's folder."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "BigSite.yaml").write_text(PROFILE)
    env = {"SLURM_CONF": str(big_site.conf), "AFTEROK_PROFILES": str(tmp_path / "profiles")}
    return write_toy(tmp_path), tmp_path / "run", env


@pytest.fixture
def afterok(monkeypatch, capsys):
    """`afterok` in this process: (words, env, check) -> the finished command."""
    monkeypatch.chdir(ROOT)

    def afterok(*words, env, check=0):
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == check, f"exit {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, code, out, err)

    afterok.json = lambda *words, **kwargs: json.loads(afterok(*words, "--json", **kwargs).stdout)
    afterok.states = lambda run, **kwargs: {
        phase["phase"]: phase["state"] for phase in afterok.json("status", run, **kwargs)["phases"]
    }
    return afterok


def jobs_of(run, env):
    return {
        row.name
        for row in Slurm(env | {"PATH": os.environ["PATH"]}).queue()
        if f".{run.name}.a" in row.name and row.state in ("PENDING", "RUNNING")
    }


@pytest.mark.parametrize("minutes", REFUSED)
def test_a_refusal_is_a_refusal_whatever_its_words_and_the_corrected_script_is_sent_next(site, minutes, afterok):
    pipeline, run, env = site
    times = [f"{phase}.resources.time={minutes}" for phase in ("numbers", "total", "again")]
    done = afterok("submit", pipeline, *times, "--run", run, env=env, check=2)
    line = one_line(done)
    assert REFUSED[minutes] in line and "nothing of submission 1 will run" in line
    assert "contact for profile BigSite: help@bigsite.example" in line
    assert f"cluster bigsite: profile BigSite ({env['AFTEROK_PROFILES']}/BigSite.yaml)" in done.stdout
    told = afterok.json("why", run, env=env)
    assert not told["healthy"] and REFUSED[minutes] in told["given_up"] and "help@bigsite" in told["given_up"]
    assert REFUSED[minutes] in afterok("status", run, env=env).stderr
    assert afterok.json("cancel", run, env=env) == {"run": str(run), "cancelled": [], "notes": []}
    assert afterok.json("repair", run, env=env)["repaired"] == [] and jobs_of(run, env) == set()
    afterok("submit", pipeline, "numbers.with.seconds=30", "--run", run, env=env)
    assert "--time=10\n" in (run / "submissions/2/scripts/numbers.sh").read_text()
    assert afterok.json("why", run, env=env)["given_up"] == ""
    assert len(afterok.json("cancel", run, env=env)["cancelled"]) == 3


@pytest.fixture
def wrapped(tmp_path, site):
    """`site` and sbatch(script): an sbatch of the site's in PATH, in which $REAL is Slurm's own."""
    pipeline, run, env = site
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()

    def sbatch(script):
        path = tmp_path / "bin" / "sbatch"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\nREAL={real}\n{script}\n")
        path.chmod(0o755)
        return env | {"PATH": f"{path.parent}:{os.environ['PATH']}"}

    return pipeline, run, sbatch


def test_a_submission_without_an_answer_is_told_of_and_cancel_takes_it_back(wrapped, afterok):
    pipeline, run, sbatch = wrapped
    env = sbatch(
        'if [ -e "$0.sent" ]; then echo "sbatch: error: Batch job submission failed: Message send failure" >&2; '
        'exit 1; fi; touch "$0.sent"; exec $REAL "$@"'
    )
    line = one_line(afterok("submit", pipeline, "--run", run, env=env, check=1))
    assert "Message send failure" in line and "afterok repair" in line
    for verb in ("why", "status"):
        done = afterok(verb, run, env=env)
        assert "submission 1 is not released" in done.stdout + done.stderr
    assert len(jobs_of(run, env)) == 1  # held
    done = afterok.json("cancel", run, env=env)
    assert len(done["cancelled"]) == 1 and "never released: taken back" in done["notes"][0]
    assert jobs_of(run, env) == set() and Ledger(run / "ledger.jsonl").unreleased() == []


def test_banners_around_an_id_and_an_sbatch_that_fails_after_all_change_nothing(wrapped, afterok):
    pipeline, run, sbatch = wrapped
    env = sbatch(
        'echo "=== BigSite ==="; $REAL "$@"; code=$?; echo "Your project has 99 hours left."; '
        'echo "quota: 12" >&2; exit $code'
    )
    afterok("run", pipeline, "--run", run, env=env)
    assert set(afterok.states(run, env=env).values()) == {"COMPLETED"}
    silent = run.with_name("silent")
    env = sbatch('$REAL "$@" > /dev/null; echo "thank you"')  # found by its name
    afterok("submit", pipeline, "numbers.with.seconds=60", "--run", silent, env=env)
    assert len({name.split(".")[0] for name in jobs_of(silent, env)}) == len(jobs_of(silent, env)) == 3
    afterok("cancel", silent, env=env)
    again = run.with_name("again")
    env = sbatch('$REAL "$@"; echo "accounting hook failed, try again" >&2; exit 3')  # the job is there all the same
    assert "try again" in one_line(afterok("submit", pipeline, "--run", again, env=env, check=2))
    assert jobs_of(again, env) == set()


# -- whose cluster, whose profile -------------------------------------------------------------------------------------


def test_from_another_cluster_every_verb_names_both_and_does_nothing(site, other_site, afterok):
    pipeline, run, env = site
    slow = ["numbers.with.seconds=60", "--run", run]
    afterok("submit", pipeline, *slow, env=env)
    mine = jobs_of(run, env)
    there = env | {"SLURM_CONF": str(other_site.conf)}
    before = (run / "ledger.jsonl").read_bytes()
    for words in (
        ["plan", pipeline, *slow],
        ["submit", pipeline, *slow],
        ["run", pipeline, *slow],
        ["cancel", run],
        ["repair", run],
        ["resubmit", run, "numbers"],
        ["why", run],
        ["status", run],
    ):
        done = afterok(*words, env=there, check=2)
        assert "went to the Slurm cluster bigsite, and the one that answers here is beta" in done.stderr, words
    assert {p["state"] for p in json.loads(afterok("status", run, "--json", env=there, check=2).stdout)["phases"]} == {
        "NO_ANSWER"
    }
    assert "unknown: " in afterok.json("ls", run.parent, env=there)["runs"][0]["state"]
    assert (run / "ledger.jsonl").read_bytes() == before and jobs_of(run, env) == mine != set()
    assert jobs_of(run, there) == set() and not list((run / "submissions").glob("2"))
    afterok("cancel", run, env=env)


def test_plan_submit_and_status_say_which_profile_and_which_file(site, other_site, afterok):
    pipeline, run, env = site
    file = f"{env['AFTEROK_PROFILES']}/BigSite.yaml"
    assert f"cluster bigsite: profile BigSite ({file})" in afterok("plan", pipeline, "--run", run, env=env).stdout
    planned = afterok.json("plan", pipeline, "--run", run, env=env)["profile"]
    assert planned == {
        "kind": "slurm",
        "name": "bigsite",
        "cluster_name": "bigsite",
        "profile": "BigSite",
        "profile_file": file,
        "profile_extends": [],
    }
    assert afterok.json("submit", pipeline, "numbers.with.seconds=60", "--run", run, env=env)["profile"] == planned
    where = f"cluster bigsite, profile BigSite ({file})"
    assert where in afterok("status", run, env=env).stdout and afterok.json("status", run, env=env)["where"] == where
    afterok("cancel", run, env=env)
    there = env | {"SLURM_CONF": str(other_site.conf)}
    said = afterok("plan", pipeline, "--run", run.with_name("there"), env=there).stdout
    assert f"cluster beta: no profile is named like it (beta.yaml in {env['AFTEROK_PROFILES']}" in said


def test_what_a_partition_would_refuse_is_told_with_the_contact(site, afterok):
    pipeline, run, env = site
    line = one_line(afterok("plan", pipeline, "numbers.resources.nodes=2", "--run", run, env=env, check=2))
    assert "ask for at most 1; contact for profile BigSite: help@bigsite.example" in line


def test_options_that_afterok_sets_are_refused_by_plan_by_name(site, afterok):
    pipeline, run, env = site
    (Path(env["AFTEROK_PROFILES"]) / "BigSite.yaml").write_text(
        PROFILE.replace("max_nodes: 1", 'max_nodes: 1, extra_sbatch: {output: /x, t: "5", comment: mine}')
    )
    lines = afterok("plan", pipeline, "--run", run, env=env, check=2).stderr.splitlines()
    assert len(lines) == 2 and "extra_sbatch.output: afterok sets sbatch's --output itself" in lines[0]
    assert "extra_sbatch.t: afterok sets sbatch's -t itself: say it as the role's time" in lines[1]


# -- jobs of others, controllers that hang, filesystems that take no writes -------------------------------------------


def test_other_jobs_of_the_user_may_have_any_name(site, afterok):
    pipeline, run, env = site
    slurm = Slurm(env | {"PATH": os.environ["PATH"]})
    others = [
        slurm.sbatch(["--hold", f"--job-name={name}", "--wrap=true"])
        for name in ("my\njob", "1\x1f2\x1f3", "a|b\tc", "\x1b[31m'\"")
    ]
    afterok("run", pipeline, "--run", run, env=env)
    assert set(afterok.states(run, env=env).values()) == {"COMPLETED"}
    slurm.cancel(others)


def test_a_sealed_run_has_its_status_while_the_controller_hangs(site, big_site, afterok):
    pipeline, run, env = site
    afterok("run", pipeline, "--run", run, env=env)
    open_run = run.with_name("open")
    afterok("submit", pipeline, "numbers.with.seconds=60", "--run", open_run, env=env)
    big_site.kill_daemon("slurmctld", signal.SIGSTOP)
    try:
        done = afterok("status", run, env=env)
        assert done.stdout.count("COMPLETED") == 3 and "Slurm does not answer" in done.stderr
        assert afterok.json("why", run, env=env)["healthy"]
        assert "Slurm does not answer" in afterok("status", open_run, env=env, check=2).stderr
    finally:
        big_site.kill_daemon("slurmctld", signal.SIGCONT)
    afterok("cancel", open_run, env=env)


@pytest.mark.soak
def test_a_run_is_followed_through_a_time_without_its_controller(site, big_site):
    pipeline, run, env = site
    command = [sys.executable, "-m", "launchers.cli", "run", pipeline, f"numbers.with.gate={run}.gate", "--run", run]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True) as following:
        lines = iter(following.stdout.readline, "")
        assert any("numbers: RUNNING" in line for line in lines)
        big_site.kill_daemon("slurmctld", signal.SIGSTOP)
        try:
            assert any("NO_ANSWER (its cluster does not answer)" in line for line in lines)
        finally:
            big_site.kill_daemon("slurmctld", signal.SIGCONT)
        Path(f"{run}.gate").touch()
        assert any("again: COMPLETED" in line for line in lines)
        assert following.wait(60) == 0


def test_a_run_on_a_read_only_filesystem_is_cancelled_all_the_same(site, afterok):
    pipeline, run, env = site
    afterok("submit", pipeline, "numbers.with.seconds=60", "--run", run, env=env)
    wait_for("its start", lambda: afterok.states(run, env=env)["numbers"] == "RUNNING")
    before = (run / "ledger.jsonl").read_bytes()
    mounted = f'mount --bind {run} {run} && mount -o remount,bind,ro {run} && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", mounted, "bash", sys.executable, "-m", "launchers.cli", "cancel", run],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs the right to mount in a namespace of its own")
    assert done.returncode == 0 and done.stdout.startswith("cancelled "), done.stderr
    assert "could not be written down: " in one_line(done) and "read-only" in done.stderr
    assert (run / "ledger.jsonl").read_bytes() == before
    wait_for("the jobs' end", lambda: jobs_of(run, env) == set())


@pytest.mark.parametrize("setup, state, told", [
    (["grep -q nothing /dev/null", "export PATHS=/opt/lib:$NOT_SET_ANYWHERE"], "COMPLETED",
     "1: grep -q nothing /dev/null"),
    (["true", "exit 3"], "FAILED", "env.setup ended the job with code 3, at or after: exit 3"),
])  # fmt: skip
def test_what_a_profiles_setup_lines_do_is_told_in_the_log_and_by_why(site, afterok, setup, state, told):
    pipeline, run, env = site
    (Path(env["AFTEROK_PROFILES"]) / "BigSite.yaml").write_text(PROFILE + f"env: {{setup: {json.dumps(setup)}}}\n")
    afterok("run", pipeline, "--run", run, env=env, check=0 if state == "COMPLETED" else 1)
    assert afterok.states(run, env=env)["numbers"] == state
    assert told in afterok("logs", run, "numbers:1", env=env).stdout
    if state == "FAILED":
        finding = afterok.json("why", run, "numbers", env=env)["findings"][0]
        assert (finding["cause"], told in finding["evidence"]) == ("environment not set up", True)
        assert (
            f"{run}/numbers/logs/a1." in finding["remedy"] and "contact for profile BigSite: help@" in finding["remedy"]
        )
        afterok("cancel", run, env=env)
