"""What a config.json says is carried over or refused, never dropped: against transformers, key by key, both ways."""

from dataclasses import replace

import pytest
import torch

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import import_hf
from megatron_ext.model_folders import model_folder
from megatron_ext.models import config_meaning
from megatron_ext.models.config_reading import WITHOUT_EFFECT
from megatron_ext.models.qwen2.kinds import KINDS
from megatron_ext.models.registry import model_type, parse_config
from tests.megatron_ext import tiny

FAMILIES = {
    "qwen2": tiny.DIMS,
    "qwen3": tiny.dims(kind="qwen3", tied=False),
    "llama": tiny.dims(kind="llama", rope_factor=8.0),
    "gpt_oss": replace(tiny.GPT_OSS_DIMS, swiglu_limit=0.5),  # which activations reach
    "nemotron_h": tiny.NEMOTRON_H_DIMS,
    "nanochat": tiny.NANOCHAT_DIMS,
    **tiny.KINDS,
}


@pytest.fixture(params=FAMILIES)
def dims(request):
    return FAMILIES[request.param]


def file_of(dims) -> dict:
    return tiny.family(dims).config.hf_config(dims)


def understood(file: dict):
    """Dims; None where the file is refused, in one line a problem."""
    _, dims, problems = parse_config(file, "config.json")
    assert (dims is None) == bool(problems) and all("\n" not in str(problem) for problem in problems)
    return dims


def test_a_model_is_called_what_its_file_calls_it(dims):
    assert model_type(tiny.family(dims), dims) == file_of(dims)["model_type"]


def others(value) -> list:
    """Values of about the same kind, for anything that JSON has."""
    if isinstance(value, bool):
        return [not value, "yes"]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1, 0, -1, "1", True]
    if isinstance(value, str):
        return [f"{value}x", 1, ""]
    if isinstance(value, list):
        return [value[:-1], [*reversed(value)], 7]
    if isinstance(value, dict):
        changed = [{**value, key: other} for key in value for other in others(value[key])]
        return [*changed, {**value, "unheard_of": 2.0}, [value], "default"]
    return [True, 3, "x", {"a": 1}]


def test_no_value_that_matters_is_dropped(dims):
    """Every value that a file may have, changed: another model or a refusal."""
    file = file_of(dims)
    ignored = WITHOUT_EFFECT | tiny.family(dims).config.WITHOUT_EFFECT
    for key in sorted(file.keys() - ignored):
        for other in others(file[key]):
            same = other == file[key] or (isinstance(other, list) and other == [*reversed(other)] == file[key])
            assert same or understood({**file, key: other}) != dims, f"{key} = {other!r}"
    for value in (True, False, 0, 1.5, "x", {}):
        assert understood({**file, "unheard_of": value}) is None, value


def in_transformers(file: dict):
    """transformers' own config of a config.json; None where it refuses the file."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(file["model_type"], **{key: file[key] for key in file if key != "model_type"})
    except Exception:  # of its validators, whichever class they are
        return None


def logits_of(config, weights: dict | None) -> tuple[torch.Tensor, dict]:
    """Of a few tokens, and the weights: random ones where none are given."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    weights = weights or {name: torch.randn_like(value) * 0.3 for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    with torch.no_grad():
        found = model(torch.arange(40)[None] % config.vocab_size, use_cache=False)
    return (found[0] if isinstance(found, tuple) else found.logits), weights


def test_what_has_no_effect_here_has_none_in_transformers(dims):
    """Of all that transformers' own config has."""
    file = {key: value for key, value in file_of(dims).items() if key != "torch_dtype"}
    theirs = in_transformers(file)
    expected, weights = logits_of(theirs, None)
    ignored = set()
    broken = {"model_type", "return_dict"}  # without dicts transformers' own models fail
    for key, value in ((key, value) for key, value in theirs.to_dict().items() if key not in broken):
        changed = [{**file, key: other} for other in others(value)]
        same = (one for one in changed if understood(one) == dims and one != file)
        if config := next(filter(None, map(in_transformers, same)), None):
            found, _ = logits_of(config, weights)
            assert (found - expected).abs().max() <= 1e-4, f"{key} = {getattr(config, key)!r}"
            ignored.add(key)
    assert {"initializer_range", "use_cache", "eos_token_id"} <= ignored


def test_keys_of_other_programs_change_nothing(dims):
    keys = {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "unsloth_fixed": True,
            "max_sequence_length": 17, "rope_interleaved": False}  # fmt: skip
    assert understood({**file_of(dims), **keys}) == understood(file_of(dims)) == dims
    assert understood({**file_of(dims), "rope_interleaved": True}) is None


REQUIRED = {  # keys without which no file is understood, and sizes that suit transformers' own for the others
    "qwen2": dict(num_attention_heads=64),
    "qwen3": dict(num_attention_heads=64),
    "llama": {},
    "gpt_oss": {},
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], n_routed_experts=8),
    "nanochat": {},
    **{kind: {} for kind in tiny.KINDS},
    "glm4_moe": dict(num_nextn_predict_layers=0, num_attention_heads=32),
}


@pytest.mark.parametrize("kind", REQUIRED)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind):
    from transformers import AutoConfig

    full = AutoConfig.for_model(kind, **REQUIRED[kind]).to_dict()
    expected = understood(full | REQUIRED[kind])
    assert expected is not None
    sizes = [value for name, value in vars(tiny.family(FAMILIES[kind]).config).items() if name in ("SIZES", "LAYERS")]
    by_field = sizes if kind != "nemotron_h" else sizes[0].values()
    needed = {name for names in by_field for name in names.values()} | {
        "model_type", "hidden_size", "vocab_size", "routed_scaling_factor", *REQUIRED[kind]
    }  # fmt: skip
    if kind in KINDS:
        needed |= {*KINDS[kind].sizes.values(), *KINDS[kind].same}
    bare = {key: value for key, value in (full | REQUIRED[kind]).items() if key in needed}
    assert understood(bare) == expected


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("qwen2", dict(rope_theta=5e5), "rope_theta is 500000.0 and rope_parameters' is 10000.0: keep the right one"),
        ("gpt_oss", dict(rope_scaling={"rope_type": "yarn", "factor": 8.0}), "factor is 4.0 and rope_scaling's is 8.0"),
        (
            "gpt_oss",
            dict(rope_scaling={"rope_type": "yarn", "truncate": -0.0}),
            "truncate is False and rope_scaling's is",
        ),
        (
            "qwen2",
            dict(rope_scaling={"rope_type": "default", "rope_theta": 5e5}),
            "rope_theta is 10000.0 and rope_scaling's",
        ),
        (
            "qwen2",
            dict(rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "factor = 0.5 is not supported",
        ),
        ("gpt_oss", dict(experts_per_token=4), "experts_per_token is 4 and num_experts_per_tok is 2"),
        ("gpt_oss", dict(initial_context_length=99), "initial_context_length is 99 and original_max_position"),
        ("nemotron_h", dict(attention_head_dim=64), "attention_head_dim is 64 and head_dim is 10"),
        ("nemotron_h", dict(layer_types=["moe"], layers_block_type=["mlp"]), "keep the right one"),
        ("qwen3", dict(attention_bias=True), "attention_bias = True is not supported for qwen3: only False is"),
        ("qwen2", dict(attention_bias=False), "attention_bias = False is not supported for qwen2: only True is"),
        ("llama", dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', neither true nor false"),
        ("qwen2", dict(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', not a positive number"),
        ("qwen2", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rope_parameters.full_attention = {"),
        ("qwen2", dict(qk_layernorm=False), "qk_layernorm = False is not supported for qwen2: it is not known"),
    ],
)
def test_what_contradicts_itself_or_is_not_understood_is_named_with_its_values(name, change, words):
    _, dims, problems = parse_config({**file_of(FAMILIES[name]), **change}, "config.json")
    assert dims is None and any(words in problem.message for problem in problems), problems


def test_a_value_that_reading_drops_is_found_when_it_is_written_again():
    """The guard behind the families' own reading."""
    dims = FAMILIES["gpt_oss"]
    file = file_of(dims) | dict(swiglu_limit=3.0, sliding_window=4, initializer_range=9.9)
    assert sorted(config_meaning.lost(file, tiny.family(dims), dims)) == [
        "sliding_window = 4 was understood as 8", "swiglu_limit = 3.0 was understood as 0.5",
    ]  # fmt: skip


def test_models_of_another_function_differ_by_name_and_both_values():
    ours = tiny.NEMOTRON_H_DIMS
    theirs = replace(ours, routed_scale=1.0, norm_epsilon=1e-6, max_positions=9999)
    family = tiny.family(ours)
    meanings = (config_meaning.meaning(family, dims) for dims in (ours, theirs))
    assert sorted(config_meaning.differences(*meanings)) == [
        "layer_norm_epsilon is 1e-05, not 1e-06", "routed_scaling_factor is 2.5, not 1.0",
    ]  # fmt: skip


# ---------------------------------------------------------------- model folders


def imported(tmp_path, name: str, **changes) -> model_folder.ModelFolder:
    (tmp_path / name).mkdir()
    hf = tiny.hf_folder(tmp_path / f"{name}.hf", tiny.dims(**changes))
    import_hf.run(import_hf.Config(str(hf)), tmp_path / name, tmp_path)
    return model_folder.open_folder(tmp_path / name)


def test_a_model_folder_whose_config_was_changed_is_refused(tmp_path):
    folder = imported(tmp_path, "model")
    for changes, said in ((dict(rope_base=5e5), "rope_theta is 500000.0, not 10000.0"), (dict(max_positions=9), "")):
        durable.write_json(folder.hf / "config.json", file_of(tiny.dims(**changes)))
        if said:
            with pytest.raises(UserMistake, match=said):
                model_folder.open_folder(folder.path)
    model_folder.open_folder(folder.path)  # longer documents: no other function


def test_weights_of_a_model_with_another_function_are_no_start(tmp_path):
    ours, theirs = imported(tmp_path, "ours"), imported(tmp_path, "theirs", norm_epsilon=1e-5)
    model_folder.check_same_model(ours, ours.weights)
    with pytest.raises(UserMistake, match="init_from: .* is not of the model .*: rms_norm_eps is 1e-05, not 1e-06"):
        model_folder.check_same_model(ours, theirs.weights)


@pytest.mark.parametrize("number", [2**16 + 1, 2**31, 2**63, 10**400, -(10**400)])
def test_numbers_that_no_model_has_are_refused_by_name(dims, number):
    """Neither a list of 2**31 layers is made of them, nor a float, which would end in a traceback."""
    file = file_of(dims)
    others = [key for key, value in file.items() if type(value) in (int, float)] if abs(number) >= 2**63 else []
    for key in ("num_hidden_layers", *others):
        _, read, problems = parse_config({**file, key: number}, "config.json")
        assert read is None and key in " ".join(map(str, problems)), key
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}
    assert "rope_parameters" in str(parse_config({**file, **nested}, "config.json")[2])
