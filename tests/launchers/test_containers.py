"""A role's ranks run in its image: for real with charliecloud, by their documented command lines with the others."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import load_pipeline
from launchers.backends.containers import contained
from launchers.planning.planner import make_plan
from slurm.client import Slurm
from slurm.detect import Cluster, find_cluster
from slurm.profile import files
from slurm.profile.check import meaning_problems
from slurm.profile.images import unseen
from slurm.profile.schema import Container, Env, Partition, Profile, Role
from tests.command import ROOT, afterok, one_line, wait_for
from tests.launchers.test_slurm_scripts import script

COUNTER = """\
name: boxed
phases:
  counter: {uses: tests.toy.counter, with: {steps: 200}, resources: {role: train}}
"""


def words(runtime, role="train", **said):
    profile = Profile(
        roles={"train": Role(), "eval": Role()},
        env=Env(set={"HF_HOME": "/hf"}, forward=["WANDB_MODE"], secrets={"KEY": "file:/k"}),
        container=Container(
            runtime=runtime,
            images={"default": "/img/base.sif", "eval": "none"},
            mounts=["/data", "/opt/x:/x:ro"] if runtime != "charliecloud" else ["/data", "/opt/x:/x"],
            python="/venv/bin/python",
            **said,
        ),
    )
    return contained(profile, role, Path("/scratch/run"), with_gpus=True)


def test_pyxis_is_told_by_options_of_srun():
    got = words("pyxis", args=["--container-writable"])
    assert got.srun == [
        "--container-image=/img/base.sif",
        "--container-mounts=/scratch/run:/scratch/run,/data:/data,/opt/x:/x:ro",
        "--container-workdir=/scratch/run",
        "--container-env=PYTHONPATH,PYTHONSAFEPATH,PYTHONUNBUFFERED,MASTER_ADDR,MASTER_PORT,HF_HOME,WANDB_MODE",
        "--container-writable",
    ]
    assert (got.before, got.exports, got.python) == ([], [], "/venv/bin/python")


def test_apptainer_stands_before_the_command_and_gets_our_variables_over_the_images():
    got = words("apptainer")
    assert got.before == [
        "apptainer", "exec", "--nv", "--bind", "/scratch/run:/scratch/run", "--bind", "/data:/data",
        "--bind", "/opt/x:/x:ro", "--pwd", "/scratch/run", "/img/base.sif",
    ]  # fmt: skip
    assert (
        got.srun == [] and got.exports[0] == '[ -z "${PYTHONPATH+x}" ] || export APPTAINERENV_PYTHONPATH="$PYTHONPATH"'
    )
    assert "APPTAINERENV_HF_HOME" in got.exports[-2] and "KEY" not in "".join(got.exports)


def test_charliecloud_stands_before_the_command_and_mounts_the_run_once():
    got = words("charliecloud")
    assert got.before == [
        "ch-run", "-b", "/scratch/run:/scratch/run", "-b", "/data:/data", "-b", "/opt/x:/x", "-c", "/scratch/run",
        "/img/base.sif", "--",
    ]  # fmt: skip
    profile = Profile(
        roles={"train": Role()}, container=Container("charliecloud", images={"train": "/i"}, mounts=["/scratch"])
    )
    assert contained(profile, "train", Path("/scratch/run"), with_gpus=False).before[1:3] == ["-b", "/scratch:/scratch"]
    assert "/scratch/run:/scratch/run" not in contained(profile, "train", Path("/scratch/run"), with_gpus=False).before


def test_a_role_may_have_no_image_and_no_profile_needs_one():
    assert words("pyxis", role="eval").python == "" == words("none").python
    profile = Profile(
        roles={"train": Role()}, container=Container("pyxis", images={"train": "/i"}, mounts=["/a", "/b:/c"])
    )
    assert unseen(profile, "train", Path("/run"), ["/run/x", "/a/y", "/b/z", "/d"]) == ["/b/z", "/d"]
    assert unseen(Profile(), "train", Path("/run"), ["/d"]) == []


BOXED = """\
partitions: {gpu: {}}
roles: {train: {}, cpu: {}}
env: {python: /outer/python}
container: {runtime: RUNTIME, images: {train: "nvcr.io#nvidia/pytorch:25.06-py3"}, python: /inner/python}
"""


def test_the_ranks_run_inside_and_what_watches_them_outside(tmp_path):
    text = script(tmp_path, BOXED.replace("RUNTIME", "pyxis"))
    (line,) = [line for line in text.splitlines() if "jobs.worker" in line]
    assert "'--container-image=nvcr.io#nvidia/pytorch:25.06-py3' " in line
    assert line.endswith("worker /inner/python -m jobs.worker /run/toy numbers $1 --submission 3 || code=$?")
    assert (
        "/outer/python -m launchers.backends.restart /run/toy numbers $1 --submission 3 --code $code --requeue" in text
    )
    text = script(tmp_path, BOXED.replace("RUNTIME", "apptainer"))
    assert "exec \"$@\"' worker apptainer exec --bind /run/toy:/run/toy --pwd /run/toy 'nvcr.io#" in text
    assert text.index("export PYTHONPATH=") < text.index("APPTAINERENV_")


def test_what_no_container_could_be_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "partitions: {p: {}}\nroles: {cpu: {}}\n"
        "container: {runtime: docker, images: {trian: x}, mounts: [a, /a:/b:rw]}\n"
    )
    with pytest.raises(UserMistake) as error:
        files.load(str(path))
    assert [problem.where.partition(": ")[2] for problem in error.value.problems] == [
        "container.runtime", "container.images.trian", "container.mounts", "container.mounts",
    ]  # fmt: skip


@pytest.fixture
def box():
    """A folder that is an image: places to mount this machine's Python at, and where the run will be."""
    if shutil.which("ch-run") is None:
        pytest.skip("needs charliecloud: apt-get install charliecloud-runtime")
    folder = Path(tempfile.mkdtemp(prefix="aok-box-", dir="/var/tmp"))
    image, mounts = (
        folder / "image",
        sorted({f"/{Path(p).parts[1]}" for p in ("/usr", sys.prefix, sys.base_prefix, ROOT)}),
    )
    for place in (
        "dev",
        "proc",
        "sys",
        "etc",
        "tmp",
        "home",
        str(folder / "runs")[1:],
        *(mount[1:] for mount in mounts),
    ):
        (image / place).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        if (place := Path("/", name)).is_symlink():
            (image / name).symlink_to(place.readlink())
    for name in ("passwd", "group", "hosts", "resolv.conf", "hostname", "nsswitch.conf"):
        (image / "etc" / name).touch()
    (image / "etc" / "box").write_text("a box\n")
    (folder / "runs").mkdir()
    yield folder, image, [*mounts, str(folder / "runs")]
    shutil.rmtree(folder)


def test_a_phase_runs_in_an_image_stops_is_requeued_from_outside_and_its_seal_has_the_digest(box, dev_cluster):
    folder, image, mounts = box
    (folder / "c.yaml").write_text(COUNTER)
    (folder / "site.yaml").write_text(
        f"""\
partitions: {{batch: {{}}}}
roles: {{train: {{time: 10}}, cpu: {{}}}}
env: {{setup: ["export PATH={Path(shutil.which("ch-run")).parent}:$PATH"]}}
container:
  runtime: charliecloud
  images: {{train: {image}}}
  mounts: [{", ".join(mounts)}]
  python: {sys.executable}
"""
    )
    run, slurm, env = RunFolder(folder / "runs" / "c"), Slurm(dev_cluster.env()), {"SLURM_CONF": str(dev_cluster.conf)}
    afterok("submit", folder / "c.yaml", f"cluster={folder / 'site.yaml'}", "--run", run.path, env=env)
    wait_for("its first step", lambda: list(run.path.glob("counter/*/progress/0000.json")))
    (row,) = [row for row in slurm.queue() if row.name.startswith("counter.c.")]
    slurm.run(["scancel", "--signal=USR2", row.job_id])
    wait_for("its seal", lambda: list(run.path.glob("counter/*/seal.json")), 300)
    wait_for("its last word, which follows the seal", lambda: len(run.outcomes("counter")) > 1)
    states = [(outcome.restart, outcome.state) for outcome in run.outcomes("counter")]
    assert states == [(0, "stopped"), (1, "sealed")]
    (seal,) = [durable.read_json(path) for path in run.path.glob("counter/*/seal.json")]
    assert seal["image"]["name"] == str(image) and len(seal["image"]["sha256"]) == 64


def test_an_input_that_the_image_does_not_see_is_refused_before_anything_is_sent(tmp_path, dev_cluster):
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "p.yaml").write_text(
        f"name: p\nphases:\n  numbers: {{uses: tests.toy.numbers, with: {{file: {tmp_path}/data.txt}}}}\n"
    )
    profile = (
        "partitions: {batch: {}}\nroles: {cpu: {}}\n"
        "container: {runtime: pyxis, images: {default: x}, mounts: [MOUNT]}\n"
    )
    (tmp_path / "site.yaml").write_text(profile.replace("MOUNT", "/elsewhere"))
    words_ = ["plan", tmp_path / "p.yaml", f"cluster={tmp_path / 'site.yaml'}", "--run", tmp_path / "run"]
    env = {"SLURM_CONF": str(dev_cluster.conf)}
    said = one_line(afterok(*words_, env=env, check=2))
    assert f"{tmp_path}/data.txt is not mounted in the container of role cpu" in said
    (tmp_path / "site.yaml").write_text(profile.replace("MOUNT", str(tmp_path)).replace("default: x", "default: /no/x"))
    assert (
        "its image /no/x is not seen from here; its seal will have the name alone" in afterok(*words_, env=env).stderr
    )
    said = one_line(afterok(*words_[:-1], tmp_path / "a,b", env=env, check=2))
    assert "pyxis takes what is behind the comma for another" in said


def test_a_secrets_file_that_the_image_does_not_see_is_refused(tmp_path):
    """The worker reads it inside the container, just before the phase runs."""
    problems = planned(tmp_path, "env: {secrets: {KEY: file:/keys/wandb, OTHER: cmd:pass show x}}\n")
    (problem,) = problems
    assert problem.check == "F004"
    assert "the secret's file /keys/wandb is not mounted in the container of role cpu" in problem.message
    seen = planned(tmp_path, "env: {secrets: {KEY: file:/keys/wandb}}\n", mounts="/keys")
    assert seen.phases[0].frozen.image["name"] == f"{tmp_path}/image"


def planned(folder, more="", mounts="/data", pipeline=""):
    """Plan one phase in an image, on a cluster that is not asked; return the plan, or its problems."""
    (folder / "image").mkdir(exist_ok=True)
    (folder / "p.yaml").write_text(f"name: p\n{pipeline}phases: {{numbers: {{uses: tests.toy.numbers}}}}\n")
    (folder / "site.yaml").write_text(
        "partitions: {batch: {}}\nroles: {cpu: {}}\n"
        f"container: {{runtime: apptainer, images: {{default: {folder}/image}}, mounts: [{mounts}]}}\n{more}"
    )
    cluster = Cluster("slurm", files.load(str(folder / "site.yaml")), {}, "site", unasked="a test")
    try:
        return make_plan(load_pipeline(folder / "p.yaml"), RunFolder(folder / "run"), cluster)
    except UserMistake as mistake:
        return mistake.problems


def test_another_image_is_told_like_other_code_and_only_reruns_where_code_does(tmp_path):
    def keys(pipeline=""):
        return planned(tmp_path, pipeline=pipeline).phases[0].frozen.key

    reported, rerun = keys(), keys("on_code_change: rerun\n")
    plain = make_plan(load_pipeline(tmp_path / "p.yaml"), RunFolder(tmp_path / "none"), find_cluster("local")).phases[0]
    assert reported != rerun != plain.frozen.key
    afterok("run", tmp_path / "p.yaml", "cluster=local", "on_code_change=report", "--run", tmp_path / "run")
    (phase,) = planned(tmp_path).phases
    assert (phase.action, phase.code_changed[-1]) == (
        "reuse", f"image none → {tmp_path}/image ({phase.frozen.image['sha256'][:12]})",
    )  # fmt: skip
    (tmp_path / "image" / "lib.so").write_text("new")
    assert (keys() == reported, keys("on_code_change: rerun\n") == rerun) == (True, False)


@pytest.mark.parametrize(
    "runtime, said, words",
    [
        ("apptainer", {"images": {"default": "i/x.sif"}}, "container.images.default: 'i/x.sif' is relative"),
        ("pyxis", {"images": {"default": "x.sqsh"}}, "container.images.default: 'x.sqsh' is relative"),
        ("charliecloud", {"images": {"default": "~/x"}}, "container.images.default: '~/x' is relative"),
        ("pyxis", {"mounts": ["/a,b"]}, "container.mounts: '/a,b': pyxis takes what is behind a comma for another"),
        ("apptainer", {"mounts": ["/a:/b:ro,rw"]}, "apptainer takes what is behind a comma for another mount"),
        ("pyxis", {"mounts": ["/a:/b:ro:x"]}, "container.mounts: '/a:/b:ro:x' is not /SRC, /SRC:/DST or"),
    ],
)
def test_what_no_runtime_would_find_is_refused(runtime, said, words):
    problems = meaning_problems(Profile(kind="slurm", roles={"train": Role()}, partitions={"p": Partition()},
                                        container=Container(runtime, **said)), "f.yaml")  # fmt: skip
    assert [problem for problem in problems if words in str(problem)], problems


@pytest.mark.parametrize("runtime, image", [("apptainer", "docker://a/b"), ("pyxis", "nvcr.io#nvidia/pytorch:25.01"),
                                            ("charliecloud", "debian"), ("apptainer", "none")])  # fmt: skip
def test_the_names_of_registries_and_storages_are_no_paths(runtime, image):
    said = Container(runtime, images={"default": image})
    assert not meaning_problems(Profile(roles={"train": Role()}, partitions={"p": Partition()}, container=said), "f")
