"""Megatron-LM's own example command, translated: every flag is known, and what it sets is what our pipeline says."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_tools.mistake import UserMistake
from jobs.schema.megatron_flags import FLAGS, table, translate
from tests.command import ROOT, afterok, one_line

EXAMPLE = """
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --use-mcore-models --transformer-impl
    transformer_engine --bf16 --te-rng-tracker --enable-cuda-graph --inference-dynamic-batching-num-cuda-graphs 1
    --inference-dynamic-batching-buffer-size-gb 20 --data-parallel-random-init --attention-backend flash
    --timing-log-level 1 --log-timers-to-tensorboard --initialize-socket-comms --ckpt-format torch --seq-length
    11999 --inference-max-seq-length 11999 --inference-max-batch-size 32 --pretrained-checkpoint /checkpoint
    --untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias --normalization RMSNorm
    --norm-epsilon 1e-5 --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
    --attention-softmax-in-fp32 --attention-dropout 0.0 --hidden-dropout 0.0 --weight-decay 0.0
    --position-embedding-type rope --rotary-percent 1.0 --rotary-base 1000000 --use-rotary-position-embeddings
    --swiglu --num-layers 64 --hidden-size 5120 --ffn-hidden-size 27648 --num-attention-heads 40
    --max-position-embeddings 131072 --tokenizer-type HuggingFaceTokenizer --tokenizer-model unsloth/Qwen2.5-32B
    --lr 1e-6 --lr-warmup-samples 0 --make-vocab-size-divisible-by 128 --clip-grad 1.0 --recompute-granularity
    selective --recompute-activations --langrl-env-config "examples/rl/environment_configs/dapo.yaml"
    --micro-batch-size 1 --global-batch-size 1024 --grpo-group-size 16 --grpo-prompts-per-step 64 --grpo-iterations
    1 --grpo-clamp-eps-lower 0.2 --grpo-clamp-eps-upper 0.28 --grpo-kl-beta 0.0 --env-config dapo.yaml
    --nproc-per-node=8 --nnodes=8 train_rl.py --mock-data --distributed-timeout-minutes 60 --train-samples 48828125
    --log-interval 10 --log-progress --timing-log-option minmax --log-params-norm --log-num-zeros-in-grad
    --log-throughput --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --no-create-attention-mask-in-dataloader
    --accumulate-allreduce-grads-in-fp32 --calculate-per-token-loss --log-straggler --disable-straggler-on-startup
    --perform-rl-step --use-distributed-optimizer --straggler-minmax-count 16 --eval-interval 20
    --rl-prompts-per-eval 32 --tensorboard-log-interval 1 --empty-unused-memory-level 2 --data-cache-path /cache
    --save /c --load /c --tensorboard-dir /t --langrl-inference-server-type inplace_megatron --seed 1
    --sequence-parallel --finetune --save-interval 20 --wandb-project p --wandb-exp-name e
    --rl-offload-optimizer-during-inference --grpo-filter-groups-with-same-reward
"""
# paths of the example's author
OURS_ALONE = {"grpo.with.mix.environments", "imported.with.megatron", "imported.with.source"}


def test_the_examples_flags_are_the_pipelines_settings():
    overrides, notes = translate(EXAMPLE)
    phases = OmegaConf.load(ROOT / "jobs/pipelines/megatron_grpo.yaml").phases
    for override in overrides:
        key, _, value = override.partition("=")
        if key in OURS_ALONE or key == "grpo.with.seed":
            continue
        said = OmegaConf.select(phases, key)
        default = {"grpo.with.parallel.pipeline": 1}.get(key, said)
        assert str(OmegaConf.create({"v": value}).v) == value
        assert _same(value, default), (override, said)
    assert len(overrides) > 30 and any(note.startswith("--langrl-inference-server-type") for note in notes)


def test_a_bound_that_means_something_else_here_is_said():
    overrides, notes = translate("--inference-max-seq-length 11999 --lr 1e-6")
    assert overrides == ["grpo.with.sampling.max_tokens=11999", "grpo.with.lr=1e-6"]
    (note,) = notes
    assert note.startswith("--inference-max-seq-length: counts the prompt too there, new tokens alone here")


def _same(value: str, said) -> bool:
    try:
        return float(value) == float(said)
    except (TypeError, ValueError):
        return value.lower() == str(said).lower()


def test_every_override_is_a_field_of_the_phase():
    from jobs.phases.grpo import Config
    from jobs.phases.import_hf import Config as ImportConfig

    schemas = {"grpo": OmegaConf.structured(Config), "imported": OmegaConf.structured(ImportConfig)}
    keys = [row.key for row in FLAGS if row.key] + [one.partition("=")[0] for row in FLAGS for one in row.fixed]
    for phase, where, *rest in (key.split(".") for key in keys):
        if where == "with":
            assert (
                OmegaConf.select(schemas[phase], ".".join(rest), throw_on_missing=False) is not None
                or rest[-1] == "megatron"
            ), rest


def test_each_flag_stands_in_one_row_and_says_one_thing():
    names = [name for row in FLAGS for name in row.names]
    assert len(names) == len(set(names))
    assert all(bool(row.key) + bool(row.fixed) + bool(row.why) == 1 for row in FLAGS)


def test_unknown_flags_and_missing_values_are_all_named_at_once():
    with pytest.raises(UserMistake) as raised:
        translate("--grpo-group-sise 8 --lr --nonsense 3")
    text = str(raised.value)
    assert "--grpo-group-sise" in text and "did you mean --grpo-group-size" in text and "--lr has no value" in text
    assert "--nonsense" in text


@pytest.mark.parametrize("text, last, dropped", [
    ("--env-config a.yaml --env-config b.yaml", "--env-config b.yaml", "--env-config a.yaml"),
    ("--langrl-env-config a.yaml --env-config=b.yaml", "--env-config b.yaml", "--langrl-env-config a.yaml"),
    ("--env-config a --env-config b --env-config a", "--env-config a", "--env-config b"),
    ("--env-config a.yaml --langrl-env-config a.yaml", "--langrl-env-config a.yaml", ""),
])  # fmt: skip
def test_of_a_setting_said_several_times_the_last_counts_and_is_told(text, last, dropped):
    key = "grpo.with.mix.environments"
    note = f"{last}: counts for {key}, said last; not {dropped}"
    assert translate(text) == ([f"{key}={last.split()[1]}"], [note] if dropped else [])


def test_a_second_value_is_refused_not_dropped():
    for row in FLAGS:
        if row.key:
            with pytest.raises(UserMistake, match=f"{row.names[0]} 1 b.yaml: takes one value, drop the other"):
                translate(f"python train.py {row.names[0]} 1 b.yaml")


def test_afterok_plan_prints_overrides_and_says_what_has_none():
    done = afterok("plan", "--from-megatron", "--grpo-group-size 8 --rl-default-top-k -1 --mock-data")
    assert done.stdout.split() == ["grpo.with.group=8", "grpo.with.sampling.top_k=0"]
    assert "--mock-data: prompts come from the mix" in done.stderr
    assert "--no-such-flag" in one_line(afterok("plan", "--from-megatron", "--no-such-flag 1", check=2))
    assert "plan needs a pipeline" in one_line(afterok("plan", check=2))


def test_the_readme_shows_the_table():
    assert table() in (Path(ROOT) / "jobs/pipelines/README.md").read_text()
