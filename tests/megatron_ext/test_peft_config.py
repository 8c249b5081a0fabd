"""Every field of PEFT's own LoraConfig: the same logits as PEFT's, or a refusal that names the field."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import import_hf
from megatron_ext.lora import peft_config
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny
from tests.megatron_ext.test_attention import forward

PLAIN = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
ONE_LAYER = {"target_modules": ["model.layers.0.self_attn.q_proj"]}
SAVED = json.loads(json.dumps(LoraConfig(**PLAIN).to_dict(), default=list))
FAMILIES = {"llama": tiny.dims(kind="llama", tied=True), "gpt_oss": tiny.GPT_OSS_DIMS}
SAME = {  # what is carried: the logits are PEFT's
    "r": dict(r=3), "lora_alpha": dict(lora_alpha=5), "lora_dropout": dict(lora_dropout=0.1),
    "target_modules": ONE_LAYER,
    "all linear": dict(target_modules="all-linear"),
    "an expression": dict(target_modules=r".*layers\.1\..*(q_proj|v_proj)"),
    "the end of a name": dict(target_modules=["1.self_attn.q_proj", "mlp.up_proj"]),
    "exclude_modules": dict(target_modules="all-linear", exclude_modules=["0.self_attn.o_proj"]),
    "an excluded expression": dict(target_modules="all-linear", exclude_modules=r".*\.0\..*"),
    "layers_to_transform": dict(layers_to_transform=[1]),
    "layers_pattern": dict(layers_to_transform=1, layers_pattern="layers"),
    "layers_pattern of no layer": dict(
        target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=[0], layers_pattern=["blocks"]
    ),
    "init_lora_weights": dict(init_lora_weights="gaussian"), "False": dict(init_lora_weights=False),
    "orthogonal": dict(init_lora_weights="orthogonal"),
}  # fmt: skip
SAME_EXPERTS = {
    "target_parameters": dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "experts of one layer": dict(target_parameters=["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]),
    "one projection": dict(target_parameters=["mlp.experts.gate_up_proj"]),
    "the other projection": dict(target_parameters=["0.mlp.experts.down_proj"]),
    "both, in different layers": dict(target_parameters=["0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]),
}
OTHER_VALUES = {  # of fields that are refused, where the field's type alone does not give one
    "peft_type": "IA3", "task_type": "SEQ_CLS", "bias": "lora_only", "init_lora_weights": "pissa",
    "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32},
    "trainable_token_indices": [1, 2], "alora_invocation_tokens": [5, 6], "layer_replication": [[0, 1], [0, 2]],
    "loftq_config": {"loftq_bits": 4},
}  # fmt: skip
SETTINGS = ("megatron_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
            "use_bdlora", "arrow_config", "kasa_config")  # fmt: skip


def saved(folder: Path, family: str, settings: dict) -> tuple[Path, PeftModel]:
    """A PEFT folder that PEFT wrote, its factors random, and PEFT's model of it."""
    hf = tiny.hf_folder(folder / "hf", FAMILIES[family])
    base = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager", dtype=torch.float32)
    base.config.use_cache = False
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{**PLAIN, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "peft")
    return hf, model


def imported(folder: Path, hf: Path):
    (folder / "model").mkdir()
    import_hf.run(import_hf.Config(str(hf), adapter=str(folder / "peft")), folder / "model", folder)
    return model_folder.load_model(model_folder.open_folder(folder / "model"), ParallelPlan(), "float32")


CASES = [("llama", name, settings) for name, settings in SAME.items()]
CASES += [("gpt_oss", name, settings) for name, settings in SAME_EXPERTS.items()]


@pytest.mark.parametrize("family, name, settings", CASES, ids=[f"{family}, {name}" for family, name, _ in CASES])
def test_what_is_carried_gives_the_logits_of_peft(family, name, settings, alone, tmp_path):
    hf, theirs = saved(tmp_path, family, settings)
    pack = tiny.pack([13], seed=1, vocabulary=FAMILIES[family].vocabulary)
    logits, batch = forward(imported(tmp_path, hf).eval(), pack)
    with torch.no_grad():
        wanted, plain = theirs(batch.ids).logits[0], theirs.get_base_model()
        with theirs.disable_adapter():
            other = plain(batch.ids).logits[0]
    # Against what the adapter changes: a wrong scale, layer or part is of its order, rounding 1e-5 of it.
    assert (logits - wanted).abs().max() < 1e-3 * (wanted - other).abs().max()


def test_no_field_of_peft_is_read_over(tmp_path):
    """Set to another value, each is carried (above), said to have no effect, or refused by its name."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(SAVED) <= fields
    tmp_path = tmp_path / "peft"
    tmp_path.mkdir()
    for name in sorted(fields - set(peft_config.CARRIED) - peft_config.WITHOUT_EFFECT):
        default = SAVED.get(name)
        value = OTHER_VALUES.get(name, {"x": 1} if name in SETTINGS else not default)
        assert name in OTHER_VALUES or name in SETTINGS or type(default) is bool, f"{name}: give another value"
        durable.write_json(tmp_path / "adapter_config.json", {**SAVED, name: value})
        adapter, problems = peft_config.read(tmp_path)
        assert adapter is None and any(problem.message.startswith(f"{name} ") for problem in problems), name
    durable.write_json(tmp_path / "adapter_config.json", {**SAVED, "peft_type": "IA3"})
    assert peft_config.read(tmp_path)[0] is None
    durable.write_json(tmp_path / "adapter_config.json", {**SAVED, "use_new_thing": False})
    (problem,) = peft_config.read(tmp_path)[1]
    assert problem.message.startswith("use_new_thing = False is not known")
    durable.write_json(tmp_path / "adapter_config.json", {**SAVED, "use_new_thing": None})
    assert peft_config.read(tmp_path)[1] == []


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "lora_ga", "mica", "x"])
def test_ways_to_begin_that_change_the_base_model_are_refused(kind, tmp_path):
    durable.write_json(tmp_path / "adapter_config.json", {**SAVED, "init_lora_weights": kind})
    (problem,) = peft_config.read(tmp_path)[1]
    assert problem.message == f"init_lora_weights {kind!r} is not understood: merge the adapter with PEFT first"


WRONG = [0, -1, 1.5, "x", True, None, [], [1], {}, {"a": 1}, float("nan"), 10**400, "(", ["a", 1], [[]], [-1]]


def test_values_of_another_type_are_one_line(tmp_path):
    for key in (*peft_config.CARRIED, *peft_config.ONLY):
        for value in WRONG:
            (tmp_path / "adapter_config.json").write_text(json.dumps({**SAVED, key: value}))
            adapter, problems = peft_config.read(tmp_path)
            assert adapter is None or not problems
            if adapter is not None:
                try:
                    adapter.reaches("model.layers.0.self_attn.q_proj.weight", "q_proj")
                except UserMistake:
                    pass


def test_a_targeted_tensor_that_is_missing_is_named(alone, tmp_path):
    from safetensors.torch import load_file, save_file

    hf, _ = saved(tmp_path, "llama", {})
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = tensors.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(UserMistake, match=rf"layers.1.self_attn.v_proj.lora_B.weight \[{len(lost)}, 4\] is missing"):
        imported(tmp_path, hf)


def test_a_parameter_that_is_none_of_the_model_is_named(alone, tmp_path):
    hf, _ = saved(tmp_path, "llama", {})
    path = tmp_path / "peft" / "adapter_config.json"
    durable.write_json(path, {**durable.read_json(path), "target_parameters": ["mlp.experts.up"]})
    with pytest.raises(UserMistake, match="target_parameters has 'mlp.experts.up', which is no matrix of this model"):
        imported(tmp_path, hf)
