"""What a rollout is asked for, and what the engine may use. No torch: plans and checks read it too."""

from dataclasses import dataclass
from typing import Any

from data_tools.base.declared import MODELS, setting
from data_tools.chats.tokenizer import NEVER
from data_tools.mistake import Problem
from data_tools.tasks.mix import MixConfig, check_mix, check_verdicts
from megatron_ext.parallel.parts import BACKENDS, FOREIGN, OPENAI
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.parallel.shape import MAMBA, MOE, ModelShape, count_blocks
from megatron_ext.rollout import endpoint
from megatron_ext.rollout.endpoint import Endpoint


@dataclass
class Sampling:
    """How the next token is chosen.

    Filters come after the temperature: top_k, top_p of what is left, then min_p.
    """

    temperature: float = setting(1.0, "logits are divided by it; 0 takes the likeliest token", least=0, example=0.7)
    top_k: int = setting(0, "only the likeliest so many tokens are drawn; 0: all", unit="tokens", least=0, example=50)
    top_p: float = setting(
        1.0,
        "only the likeliest tokens are drawn that together have this probability; 1: all",
        above=0,
        most=1,
        example=0.95,
    )
    min_p: float = setting(
        0.0,
        "only tokens at least this likely are drawn, as a share of the likeliest; 0: all",
        least=0,
        below=1,
        example=0.05,
    )
    max_tokens: int = setting(
        256, "new tokens of a completion, at most: what evaluate calls max_new_tokens", unit="tokens", least=1
    )
    stop_strings: list[str] = setting(
        list, "a completion ends where one of these texts is complete", example=["</answer>"], free=True
    )
    max_turns: int = setting(
        0, "turns of the model, at most, in tasks that reply; 0: as many as max_tokens leaves room for",
        unit="turns", least=0,
    )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_comparable(self) -> bool:
        """Whether log-probs are known without the filters: they are recorded at temperature 1."""
        return not self.is_filtered or self.temperature == 1


@dataclass
class EngineConfig:
    """What the rollout engine of a rank may use."""

    kv_gib: float = setting(1.0, "keys and values that a rank holds while it generates", unit="GiB", above=0)
    block_size: int = setting(
        256, "size of a block of keys and values; GPU kernels read multiples of 256 in place", unit="tokens", least=1
    )
    max_batch: int = setting(32, "samples that are decoded together", unit="samples", least=1)
    token_budget: int = setting(
        2048, "tokens of one forward pass: one a sample in decoding, the rest for prompts", unit="tokens", least=1
    )
    cuda_graphs: bool = setting(False, "decoding by recorded passes: models of attention without experts, no pipeline")


@dataclass
class RolloutSettings(ModelSettings):
    """What a phase that samples from a model is told: prompts and how they are spelled, the engine, the verifiers."""

    mix: MixConfig = setting(MixConfig, "the tasks whose prompts are asked, and how they are rewarded")
    chat_arguments: dict[str, Any] = setting(
        dict, "variables of the chat template, where prompts are messages", example={"enable_thinking": True}, free=True
    )
    bos: str = setting(
        "", 'the token that opens a text prompt: "" as the tokenizer adds it, or never', choices=("", NEVER),
        keyed="if_set",
    )  # fmt: skip
    prompt_tokens: int = setting(
        0, "tokens of a prompt, at most: a longer one is refused; 0: as many as the model's positions leave",
        unit="tokens", least=0, keyed="if_set",
    )  # fmt: skip
    verify_limit_s: float = setting(
        10.0, "time that a verifier has for a sample, which then counts as not scorable", unit="s", above=0
    )
    verifiers: int = setting(2, "processes of a replica that score", unit="processes", least=1, keyed=False)
    engine: EngineConfig = setting(EngineConfig, "what the rollout engine of a rank may use", keyed=False)


# Arguments of vllm.LLM about memory and speed alone: as with `engine`, they change no more than the order of sums.
VLLM_ROOM = (
    "gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "max_num_seqs", "max_num_batched_tokens",
    "max_model_len", "block_size", "enforce_eager", "enable_prefix_caching", "enable_chunked_prefill",
    "async_scheduling", "disable_custom_all_reduce", "disable_log_stats", "compilation_config",
    "distributed_executor_backend",
)  # fmt: skip


@dataclass
class SamplingSettings(RolloutSettings):
    """What a phase that samples, and trains nothing, is told: by which engine besides."""

    model: str = setting(
        "", "model folder; with backend openai there is none", example="${phases.imported.out}", input=True,
        made_by=MODELS, free=True,
    )  # fmt: skip
    backend: str = setting(
        "auto",
        "who computes: our engine, with layers as in other phases (auto, torch, te); or in its place vllm, offline, an "
        "engine an element, from the role's own environment; or openai, a server that is running (endpoint); both "
        "change the key",
        choices=(*BACKENDS, *FOREIGN),
        keyed=False,  # but `meaning`
    )
    vllm: dict[str, Any] = setting(
        dict, "arguments of vllm.LLM by name; but for those of memory and speed they change the key",
        example={"gpu_memory_utilization": 0.8}, free=True, keyed=False,
    )  # fmt: skip
    # Not keyed but for `meaning`, too.
    endpoint: Endpoint = setting(Endpoint, "the server that is asked, with backend openai", keyed=False)

    @property
    def is_foreign(self) -> bool:
        """Whether the samples are made by an engine that is not ours."""
        return self.backend in FOREIGN

    @staticmethod
    def meaning(config: "SamplingSettings") -> dict[str, Any]:
        """Return what the key says besides: a foreign engine, whose samples are others than ours."""
        if config.backend not in FOREIGN:
            return {}
        server = {"endpoint": endpoint.meaning(config.endpoint)} if config.backend == OPENAI else {}
        telling = {name: value for name, value in config.vllm.items() if name not in VLLM_ROOM}
        return {"backend": config.backend, **({"vllm": telling} if telling else {}), **server}


def check_rollouts(config: RolloutSettings, sampling: Sampling) -> list[Problem]:
    """Refuse settings of the rollouts that do not go together."""
    problems = []
    if "" in sampling.stop_strings:
        message = "one of them is empty: every completion would end at once"
        problems.append(Problem("sampling.stop_strings", message))
    if config.engine.token_budget < config.engine.max_batch:
        batch = config.engine.max_batch
        message = f"{config.engine.token_budget} tokens a pass do not hold one of each of {batch} samples"
        problems.append(Problem("engine.token_budget", f"{message}; give at least max_batch"))
    if not check_mix(config.mix, training=False, comparing=True):
        problems += check_verdicts(config.mix, config.verify_limit_s)
    if config.parallel.virtual > 1:
        problems.append(Problem("parallel.virtual", f"{config.parallel.virtual}: generation has whole stages: use 1"))
    if config.parallel.micro_batch > 1:
        number = config.parallel.micro_batch
        message = f"{number}: there are no packs to join: use 1, and row_tokens or engine.token_budget for longer rows"
        problems.append(Problem("parallel.micro_batch", message))
    return problems


def check_alone(config: RolloutSettings, compares: bool) -> list[Problem]:
    """Refuse parallel settings that are about training, in a phase that trains nothing; `compares`: choices, which are
    computed in packed rows."""
    plan, plain = config.parallel, ParallelPlan()
    problems = []
    if plan.recompute != plain.recompute:
        message = f"{plan.recompute}: nothing is trained, so that no activations are kept: use {plain.recompute}"
        problems.append(Problem("parallel.recompute", message))
    if plan.context_comm != plain.context_comm and not compares:
        message = f"{plan.context_comm}: context ranks sample by themselves, and exchange nothing: use "
        problems.append(Problem("parallel.context_comm", message + plain.context_comm))
    return problems


def check_graphs(
    config: EngineConfig, experts: bool, states: bool, stages: int, where: str = "engine"
) -> list[Problem]:
    """Refuse to record a model's decoding where its passes ask something of the host or wait for somebody."""
    reasons = {
        "its experts, whose numbers of tokens the host reads": experts,
        "its recurrent states": states,
        f"its pipeline, whose {stages} stages send to one another": stages > 1,
    }
    return [Problem(f"{where}.cuda_graphs", f"this model's decoding cannot be recorded, for {reason}; set it false")
            for reason, there in reasons.items() if config.cuda_graphs and there]  # fmt: skip


def check_recording(config: RolloutSettings, shape: ModelShape | None) -> list[Problem]:
    """Refuse it before anything runs, where the model is known."""
    if shape is None:
        return []
    blocks = count_blocks(shape.layers)
    return check_graphs(config.engine, bool(blocks[MOE]), bool(blocks[MAMBA]), config.parallel.pipeline)
