"""Keys of what was sealed before: a setting that a phase kind got since leaves them as they are until it is set."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from jobs.kind import find_kind, keyed_settings, kind_names
from jobs.schema.pipeline import load_pipeline
from launchers.planning.planner import make_plan
from slurm.detect import find_cluster

# Of each kind's default settings, as far as they are part of a key, the digest that the first seals were made with.
# A new setting is {"keyed": "if_set"}; whoever changes a line here has every sealed phase of that kind run again.
FIRST = {
    "decontaminate": "78542bd489a6",
    "dolci_prepare": "80af1343a624",
    "evaluate": "9fc98a1c2ef1",
    "export_gguf": "49a0ce50a08c",
    "export_hf": "991b046b6652",
    "export_megatron": "4f6c8cfc7d70",
    "export_nanochat": "8a8ceb06d0ac",
    "generate": "b0b9c6b6cf26",
    "grpo": "5c8870fcd159",
    "harmony_convert": "1e41e7533d9f",
    "import_hf": "3c4dc80277b1",
    "init_model": "b608dd159128",
    "materialize": "2d3234c0a40c",
    "merge_lora": "4f6c8cfc7d70",
    "pack": "b7e935762237",
    "package": "4476a967541c",
    "q_rewards": "26c5fa98c7a5",
    "reject_filter": "46ace1733edb",
    "run_exported": "2d463b7b4e40",
    "sft": "d4a8ac2e802f",
}
# On purpose, since the same settings give another result: stores of conversations are made anew, of tasks they are not.
CAME_TO_MEAN = {"materialize": {"loss": "through the stop token"}}
TINY = {"packs": "7a266f2a0b1cb2be", "controlled": "f6294f712afa5482", "exported": "81b0aaebee4274e0"}
# What the quick start was when those were sealed.
AT_FIRST = ["init.with.chats=false", "params.steps=4000", "params.grpo_steps=220", "params.train_rows=120000",
            "params.test_rows=1600", "params.samples=8", "params.control=true", "trained.with.compare_with=null",
            "exported.with.model=${phases.grpo.out}"]  # fmt: skip


@pytest.mark.parametrize("name", kind_names())
def test_a_kinds_default_settings_make_the_key_that_they_always_made(name):
    kind = find_kind(name)
    defaults = OmegaConf.to_object(OmegaConf.structured(kind.config))
    material = keyed_settings(kind.config, defaults)
    meant = CAME_TO_MEAN.get(name, {})
    assert {key: material.pop(key, None) for key in meant} == meant
    said = durable.canonical_json(material)
    digest = durable.sha256_bytes(said)[:12]
    assert name in FIRST, f"a new kind: give FIRST the line {name!r}: {digest!r}"
    assert digest == FIRST[name], f"{name}: the key's material is now {said}"


def test_the_quick_starts_keys_are_those_of_the_first_runs(tmp_path):
    template = tmp_path / "chats.jinja"  # the tokenizer had none
    template.write_text("{{ messages }}")
    overrides = [*AT_FIRST, f"rs_data.with.chat.template={template}", "cluster=local"]
    pipeline = load_pipeline(Path("jobs/pipelines/tiny.yaml"), overrides)
    planned = make_plan(pipeline, RunFolder(tmp_path / "run"), find_cluster("local")).phases
    assert {p.name: p.frozen.key for p in planned if p.name in TINY} == TINY
