"""Megatron-LM's flags of examples/rl → overrides of jobs/pipelines/megatron_grpo.yaml, or why a flag has none.

    overrides, notes = translate("--grpo-group-size 16 --lr 1e-6 …")

FLAGS is the one table of it: `afterok plan PIPELINE --from-megatron "FLAGS"` reads it, and the README shows it (a test
holds the two together). Old and new names of a flag stand in one row: Megatron-LM renamed several of examples/rl in
February 2026 (megatron/training/arguments.py).
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_tools.mistake import Problem, UserMistake, nearest


@dataclass(frozen=True)
class Flag:
    """One flag of Megatron-LM, and the override that takes its place."""

    names: tuple[str, ...]  # old and new
    key: str = ""  # the override that takes its value
    fixed: tuple[str, ...] = ()  # overrides of a flag without value, or of one whose value is looked up
    why: str = ""  # why there is no override
    unlike: str = ""  # what its value means otherwise here
    values: int = 1  # how many words follow
    convert: Callable[[str], str] = str  # from its value to ours


def _switch(*names: str, sets: tuple[str, ...] = (), why: str = "") -> Flag:
    """Return a flag without a value."""
    return Flag(names, fixed=sets, why=why, values=0)


def _none(*names: str, why: str, values: int = 1) -> Flag:
    """Return a flag that has no override."""
    return Flag(names, why=why, values=values)


def _top_p(value: str) -> str:
    return "1.0" if float(value) == 0 else value  # 0 is off there


def _top_k(value: str) -> str:
    return "0" if int(value) < 0 else value  # -1 is off there


_CONFIG = "config.json of the model says it"
_ALWAYS = "always so"

FLAGS: tuple[Flag, ...] = (
    # GRPO
    Flag(("--grpo-prompts-per-step",), "grpo.with.prompts"),
    Flag(("--grpo-group-size",), "grpo.with.group"),
    Flag(("--grpo-iterations",), "grpo.with.passes"),
    Flag(("--grpo-clamp-eps-lower",), "grpo.with.loss.clip_low"),
    Flag(("--grpo-clamp-eps-upper",), "grpo.with.loss.clip_high"),
    Flag(("--grpo-kl-beta",), "grpo.with.loss.kl_beta"),
    Flag(("--grpo-entropy-term-weight",), "grpo.with.loss.entropy"),
    _switch("--grpo-filter-groups-with-same-reward", sets=("grpo.with.advantage.drop_equal_groups=true",)),
    Flag(("--rl-default-temperature",), "grpo.with.sampling.temperature"),
    Flag(("--rl-default-top-p",), "grpo.with.sampling.top_p", convert=_top_p),
    Flag(("--rl-default-top-k",), "grpo.with.sampling.top_k", convert=_top_k),
    Flag(("--rl-prompts-per-eval",), "grpo.with.evaluation.prompts"),
    Flag(("--eval-interval",), "grpo.with.evaluation.every"),
    _none("--eval-iters", why="evaluation.prompts says how much"),
    _switch("--rl-offload-optimizer-during-inference", sets=("grpo.with.offload=true",)),
    _switch("--rl-inference-logprobs-is-correction", sets=("grpo.with.loss.correction.mode=token_truncate",)),
    Flag(("--rl-importance-sampling-truncation-coef",), "grpo.with.loss.correction.high"),
    _switch("--calculate-per-token-loss", sets=("grpo.with.loss.aggregation=token",)),
    Flag(("--langrl-env-config", "--env-config"), "grpo.with.mix.environments"),
    Flag(("--seed",), "grpo.with.seed"),
    _switch("--perform-rl-step", why="the phase is grpo"),
    _none("--langrl-inference-server-type", why="there is no server: the training model's own parameters sample"),
    _switch("--rl-use-sequence-packing", why=f"{_ALWAYS}: rollouts are packed by tokens (row_tokens)"),
    _none("--rl-sequence-packing-algo", why="rows are balanced by tokens"),
    _none("--rl-sequence-packing-max-sequences-per-bin", why="a row is bounded by row_tokens"),
    _switch("--rl-partial-rollouts", why="a step uses its own rollouts; unfinished ones survive a restart"),
    _none("--rl-parallel-generation-tasks", "--rl-generation-lag", why="a step uses its own rollouts: no lag"),
    _none("--refit-method", why="there is no second model to copy weights to"),
    _switch("--rl-durable-rollout-bank", why=f"{_ALWAYS}: tokens are recorded as they are drawn"),
    # engine
    Flag(("--inference-max-batch-size", "--inference-max-requests", "--inference-dynamic-batching-max-requests"),
         "grpo.with.engine.max_batch"),
    Flag(("--inference-dynamic-batching-buffer-size-gb",), "grpo.with.engine.kv_gib"),
    Flag(("--inference-dynamic-batching-block-size",), "grpo.with.engine.block_size"),
    Flag(("--inference-dynamic-batching-max-tokens",), "grpo.with.engine.token_budget"),
    Flag(("--inference-max-seq-length",), "grpo.with.sampling.max_tokens",
         unlike="counts the prompt too there, new tokens alone here: take off what your prompts have"),
    _switch("--enable-cuda-graph", sets=("grpo.with.engine.cuda_graphs=true",)),
    _none("--inference-dynamic-batching-num-cuda-graphs",
          why="one for each power of two of samples and of blocks, as they come"),
    _none("--cuda-graph-impl", why="engine.cuda_graphs records decoding"),
    _switch("--rl-reset-cuda-graphs", "--rl-persist-cuda-graphs",
            why="recorded anew in each rollout: keys and values are there during rollouts only"),
    _switch("--rl-offload-kv-cache-during-training", "--rl-remove-kv-cache-during-training",
            why=f"{_ALWAYS}: keys and values are there during rollouts only"),
    _none("--rl-kv-cache-management-mode", why=f"{_ALWAYS}: keys and values are there during rollouts only"),
    _switch("--inference-dynamic-batching-enable-prefix-caching",
            why=f"{_ALWAYS}: a group's samples share its prompt's blocks"),
    _switch("--enable-chunked-prefill", why=f"{_ALWAYS}: token_budget bounds a pass"),
    # parallel
    Flag(("--tensor-model-parallel-size",), "grpo.with.parallel.tensor"),
    Flag(("--pipeline-model-parallel-size",), "grpo.with.parallel.pipeline"),
    Flag(("--context-parallel-size",), "grpo.with.parallel.context"),
    Flag(("--expert-model-parallel-size",), "grpo.with.parallel.expert"),
    Flag(("--expert-tensor-parallel-size",), "grpo.with.parallel.expert_tensor"),
    _switch("--sequence-parallel", sets=("grpo.with.parallel.sequence_parallel=true",)),
    Flag(("--recompute-granularity",), "grpo.with.parallel.recompute"),
    _switch("--recompute-activations", sets=("grpo.with.parallel.recompute=selective",)),
    _none("--micro-batch-size", why="rows of up to row_tokens take the place of micro-batches"),
    _switch("--use-distributed-optimizer", why=_ALWAYS),
    _switch("--accumulate-allreduce-grads-in-fp32", why=_ALWAYS),
    _switch("--use-mcore-models", why=_ALWAYS),
    Flag(("--nnodes",), "grpo.resources.nodes"),
    Flag(("--nproc-per-node",), "grpo.resources.gpus_per_node"),
    # optimizer and length of the run
    Flag(("--lr",), "grpo.with.lr"),
    Flag(("--min-lr",), "grpo.with.min_lr"),
    Flag(("--lr-decay-style",), "grpo.with.schedule", convert=str.lower),
    _none("--lr-warmup-samples", why="warmup_steps counts updates: samples / (prompts x group)"),
    Flag(("--weight-decay",), "grpo.with.weight_decay"),
    Flag(("--clip-grad",), "grpo.with.clip_grad"),
    Flag(("--adam-beta1",), "grpo.with.beta1"),
    Flag(("--adam-beta2",), "grpo.with.beta2"),
    Flag(("--adam-eps",), "grpo.with.epsilon"),
    _switch("--bf16", sets=("grpo.with.dtype=bfloat16",)),
    Flag(("--train-iters",), "grpo.with.steps"),
    _none("--train-samples", why="steps counts updates"),
    _none("--global-batch-size", why="prompts x group samples a step; minibatches cuts them into several updates"),
    # checkpoints, logs, the job
    Flag(("--save-interval",), "grpo.with.checkpoint_every"),
    _none("--save", "--load", why="checkpoints lie in the phase's folder, and a requeued job goes on from the newest"),
    _switch("--finetune", why="the phase begins from its model folder; init_from is that"),
    Flag(("--pretrained-checkpoint",), "imported.with.megatron"),
    _none("--ckpt-format", why="import_hf reads Megatron's torch format, checkpoints are torch_dist"),
    _none("--wandb-project", "--wandb-exp-name", why="track.wandb turns W&B on, track.project and track.name name it"),
    _none("--tensorboard-dir", why="track.tensorboard writes event files into the phase's folder"),
    _none("--tensorboard-log-interval", "--log-interval",
          "--timing-log-level", "--timing-log-option", "--straggler-minmax-count", why="metrics.jsonl has every step"),
    _switch("--log-timers-to-tensorboard", "--log-progress", "--log-params-norm", "--log-num-zeros-in-grad",
            "--log-throughput", "--log-straggler", "--disable-straggler-on-startup",
            why="metrics.jsonl has every step"),
    _none("--data-cache-path", why="prompts need no cache"),
    _switch("--mock-data", why="prompts come from the mix"),
    _none("--exit-duration-in-mins", why="Slurm's signal before the time limit ends a link at a checkpoint"),
    Flag(("--distributed-timeout-minutes",), "grpo.with.distributed_timeout_minutes"),
    # the model
    Flag(("--transformer-impl",), "grpo.with.backend",
         convert=lambda v: "te" if v == "transformer_engine" else "torch"),
    Flag(("--tokenizer-model",), "imported.with.source"),
    _none("--tokenizer-type", "--seq-length", "--max-position-embeddings", "--num-layers", "--hidden-size",
          "--ffn-hidden-size", "--num-attention-heads", "--num-query-groups", "--normalization", "--norm-epsilon",
          "--position-embedding-type", "--rotary-percent", "--rotary-base", "--attention-dropout", "--hidden-dropout",
          "--make-vocab-size-divisible-by", why=_CONFIG),
    _switch("--untie-embeddings-and-output-weights", "--disable-bias-linear", "--add-qkv-bias",
            "--group-query-attention", "--use-rotary-position-embeddings", "--swiglu", why=_CONFIG),
    _none("--attention-backend", why="each part of a layer has its kernels: backend"),
    _switch("--attention-softmax-in-fp32", "--no-masked-softmax-fusion", "--te-rng-tracker",
            "--data-parallel-random-init", "--initialize-socket-comms", "--no-create-attention-mask-in-dataloader",
            why="nothing to choose here"),
    _none("--empty-unused-memory-level", why="nothing to choose here"),
)  # fmt: skip


def translate(text: str) -> tuple[list[str], list[str]]:
    """Return (our overrides, a line for each flag that has none). Raises UserMistake naming every flag nobody knows."""
    rows = {name: row for row in FLAGS for name in row.names}
    words = _words(text)
    notes, problems, said = list[str](), list[Problem](), list[tuple[str, str, str]]()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        row = rows.get(name)
        if row is None:
            if name.startswith("--"):
                problems.append(
                    Problem("--from-megatron", f"{name} is no flag that is known here{nearest(name, list(rows))}")
                )
                while words and not words[0].startswith("--"):
                    words.pop(0)
            continue  # a script's name, or a value of an unknown flag
        value, wrong = _value(name, row, words) if row.values and not equals else (value, "")
        if wrong:
            problems.append(Problem("--from-megatron", wrong))
            continue
        if row.why:
            notes.append(f"{name}: {row.why}")
        said += [(name, key, fixed) for key, _, fixed in (override.partition("=") for override in row.fixed)]
        if row.key:
            try:
                said.append((name, row.key, row.convert(value)))
                notes += [f"{name}: {row.unlike}"] if row.unlike else []
            except ValueError:
                problems.append(Problem("--from-megatron", f"{name} {value}: not a number"))
    if problems:
        raise UserMistake(problems)
    overrides = {key: value for _, key, value in said}  # the last one counts, as for Megatron-LM
    return [f"{key}={value}" for key, value in overrides.items()], notes + _said_again(said)


def _value(name: str, row: Flag, words: list[str]) -> tuple[str, str]:
    """Take the value of a flag from the words behind it. Return (value, what is wrong with them)."""
    if not words or words[0].startswith("--"):
        return "", f"{name} has no value"
    value = words.pop(0)
    is_another = row.key and words and not words[0].startswith("-") and not words[0].endswith(".py")  # a script
    return value, f"{name} {value} {words[0]}: takes one value, drop the other" if is_another else ""


def _said_again(said: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return a line for each setting that several (flag, setting, value) give several values: which of them counts."""
    by_key: dict[str, dict[str, str]] = {}
    for name, key, value in said:
        by_key.setdefault(key, {}).pop(value, None)
        by_key[key][value] = name  # in the order in which each was said last
    notes = []
    for key, names in by_key.items():
        *before, last = names
        if before:
            dropped = ", ".join(f"{names[value]} {value}" for value in before)
            notes.append(f"{names[last]} {last}: counts for {key}, said last; not {dropped}")
    return notes


def _words(text: str) -> list[str]:
    """Return the words of a command line that may span several."""
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise UserMistake(Problem("--from-megatron", f"cannot be read as a command line: {error}")) from None


def table() -> str:
    """Return FLAGS as the README shows it: Markdown."""
    lines = ["| Megatron-LM | afterok |", "|---|---|"]
    for row in FLAGS:
        names = ", ".join(f"`{name}`" for name in row.names)
        ours = f"`{row.key}`" if row.key else ", ".join(f"`{override}`" for override in row.fixed) or row.why
        lines.append(f"| {names} | {ours}{row.unlike and f' ({row.unlike})'} |")
    return "\n".join(lines)
