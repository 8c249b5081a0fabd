"""A pipeline that asks a server: the key reaches it and nothing else; plan refuses a key that reaches nobody."""

import os
import secrets
from pathlib import Path

import pytest

from slurm.profile.check import unreachable_secrets
from slurm.profile.files import load
from tests.command import afterok, one_line
from tests.launchers.test_secrets import LOCAL_PROFILE, SLURM_PROFILE
from tests.megatron_ext.foreign.server import Server, serving

pytest.importorskip("openai")
PIPELINE = """
name: taught
phases:
  taught:
    uses: generate
    with:
      backend: openai
      endpoint: {{url: "{url}", model: teacher, key: "{key}"}}
      mix: {{entries: {{calculator: {{source: {{synthetic_rows: 6}}}}}}}}
      samples: 2
      sampling: {{max_tokens: 8}}
  kept: {{uses: reject_filter, with: {{inputs: ["${{phases.taught.out}}"]}}}}
"""


def written(folder: Path, server: Server, key: str) -> Path:
    path = folder / "taught.yaml"
    path.write_text(PIPELINE.format(url=server.url, key=key))
    return path


def site(folder: Path, text: str) -> str:
    path = folder / "site.yaml"
    path.write_text(text)
    return f"cluster={path}"


def right(asked: dict) -> str:
    return str(eval(asked["messages"][-1]["content"].rstrip("="))).removesuffix(".0")


def test_the_key_reaches_the_server_and_no_file_of_the_run(tmp_path):
    key, file, run = f"sk-planted-{secrets.token_hex(12)}", tmp_path / "key", tmp_path / "run"
    file.touch(0o600)
    file.write_text(f"{key}\n")
    cluster = site(tmp_path, LOCAL_PROFILE)
    with serving(key=f"{key}-and-more", models=["teacher"], answer=right) as server:
        pipeline = written(tmp_path, server, f"file:{file}")
        done = afterok("run", pipeline, cluster, "--run", run, check=2)  # which says the key back
        assert f"refuses the key of file:{file} (401)" in done.stderr and key not in done.stdout + done.stderr
        server.key = key
        afterok("run", pipeline, cluster, "--run", run)
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {key}"}
    assert (run / "kept").is_dir()
    holding = [path for path in run.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert holding == []


@pytest.mark.parametrize(
    "profile, environment, said",
    [
        (LOCAL_PROFILE, {}, "TEACHER_KEY is not set; export it"),
        (
            SLURM_PROFILE,
            {"TEACHER_KEY": "sk-planted"},
            "env:TEACHER_KEY reaches no job of role cpu: name where it lies",
        ),
        (LOCAL_PROFILE, {"TEACHER_KEY": "sk-planted"}, ""),
        (LOCAL_PROFILE + "env: {secrets: {TEACHER_KEY: 'file:/keys/teacher'}}\n", {}, ""),
    ],
)
def test_plan_refuses_a_key_that_reaches_no_job(tmp_path, profile, environment, said):
    cluster = site(tmp_path, profile).removeprefix("cluster=")
    found = unreachable_secrets(load(cluster), "cpu", {"TEACHER_KEY": "env:TEACHER_KEY"}, environment)
    assert (said in found[0] and "sk-planted" not in found[0]) if said else found == []


def test_plan_asks_no_server_and_shows_no_literal_key(tmp_path):
    with serving() as server:
        cluster = site(tmp_path, LOCAL_PROFILE)
        pipeline = written(tmp_path, server, "env:TEACHER_KEY")
        env = {name: value for name, value in os.environ.items() if name != "TEACHER_KEY"}
        said = one_line(afterok("plan", pipeline, cluster, "--run", tmp_path / "run", env=env, check=2))
        assert "phases.taught.with: TEACHER_KEY is not set" in said
        afterok("plan", pipeline, cluster, "--run", tmp_path / "run", env={**env, "TEACHER_KEY": "sk-planted"})
        pipeline = written(tmp_path, server, "sk-planted-0123")
        said = one_line(afterok("plan", pipeline, cluster, "--run", tmp_path / "run", check=2))
        assert "taught.with.endpoint.key: is no reference" in said and "sk-planted" not in said
        assert not server.asked and not (tmp_path / "run").exists()
