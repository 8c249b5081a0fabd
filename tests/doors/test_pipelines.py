"""What users and admins write: pipelines, overrides, profiles, recipes, environments of tasks, names and paths."""

import json
import random
import re

import yaml

from data_tools.base.inside import inside
from data_tools.base.yaml_loaders import TextLoader, ValueLoader
from data_tools.tasks.environments import read_environments
from jobs.artifacts.run_folder import path_problem
from jobs.schema.pipeline import NAME, load_pipeline
from slurm.profile.files import load
from tests.doors.damage import damaged
from tests.doors.sweep import Door, Refused, check, counts

PIPELINE = b"""\
name: swept
params: {rows: 8, length: 416, rate: 1e-3, word: plain}
phases:
  data:
    uses: materialize
    with: {task: calculator, tokenizer: ./tok, source: {synthetic_rows: "${params.rows}"}, on_bad_row: bucket}
    array: 2
    resources: {role: cpu, time: "0:30:00"}
  packed:
    uses: pack
    needs: [{data: afterany}]
    with: {store: "${phases.data.out}", pack_length: "${params.length}"}
  trained:
    uses: sft
    needs: [{packed: afterany}]
    with:
      packs: "${phases.packed.out}"
      steps: 4
      lr: "${params.rate}"
    throttle: 1
"""
OVERRIDES = (b"params.rows=16", b"packed.with.seed=8", b"data.resources.time=1:00:00", b"params.rate=2e-3",
             b"data.array=[1, 2]", b"packed.with.pack_length=32", b'params.word="two words"')  # fmt: skip


def meant(pipeline):
    return [pipeline.name, pipeline.params, pipeline.on_code_change, pipeline.waive, pipeline.declared, [
        [phase.name, phase.uses, repr(phase.needs), phase.settings, repr(phase.config), repr(phase.array),
         phase.throttle, repr(phase.resources)] for phase in pipeline.phases.values()]]  # fmt: skip


def as_yaml(loader):
    """YAML's own reading, keys that stand twice kept: what PyYAML composes, each scalar by its tag."""

    def told(data):
        def plain(node):
            if isinstance(node, yaml.MappingNode):
                return ["mapping", *sorted(([plain(key), plain(value)] for key, value in node.value), key=repr)]
            if isinstance(node, yaml.SequenceNode):
                return [plain(item) for item in node.value]
            if node.tag.rpartition(":")[2] in ("int", "float"):  # 2e-3 and 2E-3 are one
                return ["number", repr(yaml.load(node.value, loader)).removesuffix(".0").replace("-0", "0")]
            return [node.tag, re.sub(r"\$\{\s*([\w.]+)\s*\}", r"${\1}", node.value)]

        text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
        return plain(yaml.compose(text, loader))

    return told


@counts
def test_pipelines(cases, tmp_path, record):
    path = tmp_path / "p.yaml"

    def read(data):
        path.write_bytes(data)
        return meant(load_pipeline(path))

    check(Door("pipelines", [PIPELINE], read, as_yaml(ValueLoader)), cases, record)


@counts
def test_overrides(cases, tmp_path, record):
    path = tmp_path / "p.yaml"
    path.write_bytes(PIPELINE[: PIPELINE.index(b"  trained:")])

    def read(data):
        return meant(load_pipeline(path, data.decode("utf-8", "surrogateescape").split("\x1e")))

    def told(data):
        return [[override.partition("=")[0], as_yaml(ValueLoader)(override.partition("=")[2].encode())]
                for override in data.decode().split("\x1e")]  # fmt: skip

    def damage(data: bytes, draw: random.Random):
        overrides = data.split(b"\x1e")
        place = draw.randrange(len(overrides))
        key, _, value = overrides[place].partition(b"=")
        if draw.random() < 0.7:
            how, value = damaged(value, draw)
        else:
            how, key = damaged(key, draw)
        overrides[place] = key + b"=" + value
        return how, b"\x1e".join(overrides)

    check(Door("overrides", [b"\x1e".join(OVERRIDES)], read, told, damage=damage), cases, record)


PROFILE = b"""\
meta: {name: other, contact: admin@example.org}
partitions:
  short: {max_time: "1:00:00", max_nodes: 4, gpus_per_node: 0}
  gpu: {max_time: "1-00:00:00", gpus_per_node: 8, account: lab}
roles:
  cpu: {partition: short}
  train: {partition: gpu, time: "4:00:00"}
env:
  set: {OMP_NUM_THREADS: "1", EMPTY: ""}
  forward: [HF_HOME]
  setup: ["module purge"]
waive: [H002]
"""


@counts
def test_profiles(cases, tmp_path, record):
    path = tmp_path / "swept.yaml"

    def read(data):
        path.write_bytes(data)
        return repr(load(str(path)))

    check(Door("profiles", [PROFILE], read, as_yaml(TextLoader)), cases, record)


ENVIRONMENTS = b"""\
- agent_type: examples.rl.environments.math.dapo_agent.DAPOAgent
  agent_args: {format_reward: 0.5, answer_format: boxed, negative_reward: 0.0}
  weight: 2.0
- agent_type: AIMEAgent
  agent_args: {chat_mode: true}
  weight: 3
  evaluation_only: true
"""


@counts
def test_environments_of_tasks(cases, tmp_path, record):
    path = tmp_path / "env.yaml"

    def read(data):
        path.write_bytes(data)
        return repr(read_environments(path))

    check(Door("environments", [ENVIRONMENTS], read, as_yaml(ValueLoader)), cases, record)


# -- names and paths --------------------------------------------------------------------------------------------------


@counts
def test_names_of_phases_and_files(cases, tmp_path, record):
    """What a name leads to lies where names lead to, whatever stands in it."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.json").write_text("x")
    for name in ("config.json", "a b.txt", "sub/x.bin"):
        (folder / name).write_text("y")
    (folder / "out.json").symlink_to(tmp_path / "outside.json")

    def read(data):
        text = data.decode("utf-8", "surrogateescape")
        pipeline = tmp_path / "p.yaml"
        if not NAME.match(text):
            found = inside(folder, text)
            assert found.resolve().is_relative_to(folder)
            return ["file", str(found)]
        pipeline.write_text(json.dumps({"name": text, "phases": {text: {"uses": "pack", "with": {"store": "x"}}}}))
        return ["name", list(load_pipeline(pipeline).phases), text]

    def told(data):
        return re.sub("/+", "/", data.decode())

    check(Door("names", [b"config.json", b"sub/x.bin", b"phase_1"], read, told), cases, record)


@counts
def test_paths_of_runs(cases, tmp_path, record):
    """A path that is taken can be made, stands in a line of a script, and is found again by its text."""

    def read(data):
        path = tmp_path / data.decode("utf-8", "surrogateescape").lstrip("/")
        if problem := path_problem(path, on_slurm=True):
            raise Refused(problem)
        path.mkdir(parents=True, exist_ok=True)
        assert path.is_dir() and "\n" not in str(path) and ":" not in str(path)
        return str(path)

    def told(data):
        return re.sub("/+", "/", data.decode())

    check(Door("paths of runs", [b"runs/tiny", b"a b/c-1.2", "läufe/é".encode()], read, told), cases, record)
