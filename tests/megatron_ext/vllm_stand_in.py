"""A stand-in for the package vllm, with the signatures of release 0.32 as far as we call them: LLM, SamplingParams,
EngineArgs, LLMEngine. Its model says tokens that follow from prompt, seed and place, one a request and step.

    vllm/entrypoints/llm.py 178     vllm/sampling_params.py 282     vllm/v1/engine/llm_engine.py 224, 229, 319
"""

import hashlib
import queue
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

VOCABULARY = 12  # of tokens that it says


class EngineDeadError(Exception):
    """As vllm/v1/engine/exceptions.py has it."""

    def __init__(self, *args: object) -> None:
        super().__init__("EngineCore encountered an issue", *args)


@dataclass
class EngineArgs:
    """Some of its fields."""

    max_num_seqs: int | None = None
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
    pipeline_parallel_size: int = 1
    generation_config: str = "auto"
    logprobs_mode: str = "raw_logprobs"


@dataclass
class SamplingParams:
    """Those of its fields that we set."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


def said(prompt: list[int], seed: int | None, place: int) -> int:
    """Return the token that follows, among the first VOCABULARY."""
    digest = hashlib.sha256(f"{prompt} {seed} {place}".encode()).digest()
    return digest[0] % VOCABULARY


@dataclass
class _Request:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)


class Core:
    """Its client of an engine in another process: a step waits for outputs, and a death alone puts none there."""

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.outputs_queue: queue.Queue[Exception] = queue.Queue()


class LLMEngine:
    """Its requests, one token each a step."""

    def __init__(self, max_model_len: int):
        self.model_config = SimpleNamespace(max_model_len=max_model_len, get_vocab_size=lambda: LLM.vocabulary)
        self.requests: dict[str, _Request] = {}
        self.asked: list[_Request] = []
        self.aborted: list[str] = []
        self.finished: list[_Request] = []
        self.engine_core: Core | None = None
        self.dies_after = -1  # steps
        self.dies_of: Exception = EngineDeadError()

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, arrival_time: float | None = None
    ) -> str:
        request = _Request(request_id, list(prompt["prompt_token_ids"]), params)
        assert all(token < LLM.vocabulary for token in [*request.prompt, *(params.stop_token_ids or ())]), (
            "no such token"
        )
        self.requests[request_id] = request
        self.asked.append(request)
        return request_id + "-internal"

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        assert self.dies_after, "nobody is there to be told"
        self.aborted += request_ids
        for name in request_ids:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        if self.dies_after == 0 and self.engine_core is not None:
            self.engine_core.resources.engine_dead = True
            raise self.engine_core.outputs_queue.get(timeout=30)
        if self.dies_after == 0:
            raise self.dies_of
        self.dies_after -= 1
        return [self._stepped(request) for request in list(self.requests.values())]

    def _stepped(self, request: _Request) -> Any:
        params = request.params
        token = said(request.prompt, params.seed, len(request.token_ids))
        request.token_ids.append(token)
        reason = "stop" if token in (params.stop_token_ids or ()) else None
        if reason is None and len(request.token_ids) == params.max_tokens:
            reason = "length"
        if reason:
            del self.requests[request.request_id]
            self.finished.append(request)
        tokens = list(request.token_ids)
        logprobs = [{token: SimpleNamespace(logprob=-0.5 * (place + 1))} for place, token in enumerate(tokens)]
        prompt = [None, *({token: SimpleNamespace(logprob=-0.25 * token)} for token in request.prompt[1:])]
        out = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=reason)
        return SimpleNamespace(
            request_id=request.request_id, outputs=[out], finished=reason is not None, prompt_logprobs=prompt
        )


class LLM:
    """The offline engine."""

    started: list["LLM"] = []
    vocabulary = 1000  # tokens of its model
    core: type[Core] | None = None  # Core: it is in another process

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        **kwargs: Any,
    ):
        assert skip_tokenizer_init
        args = EngineArgs(**kwargs)
        self.llm_engine = LLMEngine(args.max_model_len or 512)
        self.llm_engine.engine_core = LLM.core() if LLM.core else None
        self.model, self.dtype = model, dtype
        LLM.started.append(self)


def modules() -> dict[str, ModuleType]:
    """Return what stands in sys.modules."""
    names = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "__version__": "0.32.0"},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError, "EngineGenerateError": EngineDeadError},
    }
    made = {}
    for name, said_there in names.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(said_there)
    return made
