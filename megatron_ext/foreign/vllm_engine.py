"""vLLM's engine, step by step: token ids in, completions out as they end, in any order."""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from data_tools.mistake import Problem, UserMistake
from data_tools.progress import ENGINE_DIED
from megatron_ext.foreign.maker import Ask, Completion
from megatron_ext.foreign.vllm_arguments import sampling_arguments
from megatron_ext.rollout.settings import Sampling

_LOOK_S = 0.5  # between two looks whether the engine's process lives


class EngineDied(Exception):
    """The engine's own processes ended: the element is run again, and goes on with what was recorded."""


def tell_of_death(engine: Any, dead: tuple[type[BaseException], ...]) -> None:
    """Have a step raise the first of `dead` once the engine's own process has ended.

    vLLM 0.32 notes such an end (core_client.py 816) and shuts its sockets, but whoever waits for a step's outputs
    (get_output, 993) waits for ever. An engine within this process needs nothing of it.
    """
    core: Any = getattr(engine, "engine_core", None)
    resources: Any = getattr(core, "resources", None)
    outputs: Any = getattr(core, "outputs_queue", None)
    if not dead or outputs is None or not hasattr(resources, "engine_dead"):
        return

    def watch() -> None:
        while not resources.engine_dead:
            time.sleep(_LOOK_S)
        outputs.put_nowait(dead[0]())

    threading.Thread(target=watch, daemon=True, name="engine-watch").start()


class Stepped:
    """vllm.LLM by its engine's steps. `params_of(**arguments)` makes vllm.SamplingParams."""

    def __init__(self, llm: Any, params_of: Callable[..., Any], dead: tuple[type[BaseException], ...]):
        self.engine, self.params_of, self.dead = llm.llm_engine, params_of, dead
        tell_of_death(self.engine, dead)
        self.longest: int = llm.llm_engine.model_config.max_model_len
        self.vocabulary: int = llm.llm_engine.model_config.get_vocab_size()  # tokens that the model has
        self._number = 0

    def check(self, uid: str, prompt: Sequence[int], new: int) -> None:
        """Raise UserMistake for a prompt that leaves no room for so many new tokens, or has some that are unknown."""
        if len(prompt) + new > self.longest:
            raise too_long(uid, len(prompt), new, longest=self.longest)
        if (token := max(prompt)) >= self.vocabulary:
            raise unknown_token(uid, token, self.vocabulary)

    def run(self, asked: Mapping[Any, tuple[Sequence[int], Mapping[str, Any]]]) -> "Generator[list[tuple[Any, Any]]]":
        """Ask for a completion of each of these prompts, by key; yield what each step told: (key, RequestOutput).

        Whoever closes it gives up what is under way.
        """
        names: dict[str, Any] = {}
        try:
            for key, (prompt, arguments) in asked.items():
                self._number += 1
                name = str(self._number)
                names[name] = key
                params = self.params_of(**arguments)
                self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
            while self.engine.has_unfinished_requests():
                told = [(names[one.request_id], one) for one in self.engine.step() if one.request_id in names]
                yield told
                for _, one in told:
                    if one.finished:
                        del names[one.request_id]
        except self.dead as error:
            names.clear()  # nobody is there to be told
            raise EngineDied(f"{ENGINE_DIED}: vLLM: {type(error).__name__}: {error}") from None
        except Exception as error:
            names.clear()
            if mistake := too_little_memory(error):
                raise mistake from None
            raise
        finally:
            self.abort(list(names))

    def abort(self, names: list[str]) -> None:
        """Give up these requests, as far as the engine lives."""
        if names:
            try:
                self.engine.abort_request(names)
            except self.dead:
                return
            while self.engine.has_unfinished_requests():  # what another step had begun is told and forgotten
                self.engine.step()


class VllmCompleter:
    """Completes prompts for JournaledMaker, by one way of sampling. A completion ends where our engine ends it."""

    def __init__(
        self,
        started: Callable[[], Stepped],
        sampling: Sampling,
        *,
        stop_ids: set[int],
        completes: Callable[[Sequence[int], Sequence[str]], bool],
        model: str,
    ):
        """`started` gives the engine. `completes(tokens, texts)` says whether the last of the tokens completes one of
        the texts."""
        self.started, self.sampling, self.stop_ids, self.completes = started, sampling, stop_ids, completes
        self.model = model

    def complete(self, asks: Sequence[Ask]) -> Generator[Completion | None, None, None]:
        """Yield the completion of each, as they end; None after a step in which none did."""
        if not asks:
            return
        stepped, asked = self.started(), {}
        stop_ids = {token for token in self.stop_ids if token < stepped.vocabulary}  # vLLM refuses others
        for ask in asks:
            stepped.check(ask.draw.item.uid, ask.prompt, self.sampling.max_tokens)
            arguments = sampling_arguments(self.sampling, stop_ids, ask.seed)
            asked[ask.item, ask.number] = (ask.prompt, arguments)
        by_key = {(ask.item, ask.number): ask for ask in asks}
        looked = dict.fromkeys(by_key, 0)  # tokens of each that were looked at for stop strings
        with contextlib.closing(stepped.run(asked)) as run:
            for told in run:
                for key, one in told:
                    completion = self._ended(by_key[key], one, looked) if key in looked else None
                    if completion is not None:
                        del looked[key]
                        if not one.finished:
                            stepped.engine.abort_request([one.request_id])
                        yield completion
                yield None

    def _ended(self, ask: Ask, told: Any, looked: dict[tuple[int, int], int]) -> Completion | None:
        """Return the completion that a request came to, None while it is under way."""
        key, out = (ask.item, ask.number), told.outputs[0]
        tokens = list(out.token_ids)
        finish = {"stop": "stop", "length": "length", None: ""}.get(out.finish_reason, "abort")
        for count in range(looked[key] + 1, len(tokens) + 1) if self.sampling.stop_strings else ():
            if self.completes(tokens[:count], self.sampling.stop_strings):
                finish, tokens = "stop", tokens[:count]
                break
        looked[key] = len(tokens)
        if not finish:
            return None
        logprobs = [float(one[token].logprob) for one, token in zip(out.logprobs, tokens)]
        for place, value in enumerate(logprobs):
            if value != value:
                raise UserMistake(
                    f"{self.model} gives NaN or infinite logits for prompt {ask.draw.item.uid}, sample {ask.number}, "
                    f"new token {place + 1}: its weights are damaged, or overflow in their dtype; look at what made "
                    "them, or try dtype: float32"
                )
        return Completion(ask.item, ask.number, tokens, logprobs, finish)


def prompt_log_probs(stepped: Stepped, asked: Mapping[Any, tuple[Sequence[int], int]]) -> Iterator[tuple[Any, float]]:
    """Yield (key, sum of the log-probs of the last `count` tokens) of each (tokens, count), as they come."""
    arguments = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False, "ignore_eos": True}
    for told in stepped.run({key: (tokens, arguments) for key, (tokens, _) in asked.items()}):
        for key, one in told:
            if one.finished:
                tokens, count = asked[key]
                last = list(zip(tokens, one.prompt_logprobs))[len(tokens) - count :]
                yield key, sum(float(entry[token].logprob) for token, entry in last)


_MEMORY = ("out of memory", "outofmemoryerror", "available memory", "can't allocate memory", "kv cache")
_REMEDY = (
    "give the engine less to hold (vllm: {max_model_len: …, max_num_seqs: …}) or more room (vllm: "
    "{gpu_memory_utilization: …}, kv_cache_memory_bytes; on a CPU VLLM_CPU_KVCACHE_SPACE in GiB), or spread the model "
    "by parallel.tensor"
)


def too_little_memory(error: Exception) -> UserMistake | None:
    """Return the mistake of an engine whose memory does not hold what it was asked for; None of any other error."""
    if not any(words in f"{type(error).__name__}: {error}".lower() for words in _MEMORY):
        return None
    first = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return UserMistake(Problem("vllm", f"{first}: {_REMEDY}"))


def too_long(uid: str, prompt: int, new: int, longest: int) -> UserMistake:
    """Return the mistake of a sequence for which the engine has no room."""
    said = f"prompt {uid} has {prompt:,} tokens, with {new:,} new ones more than the {longest:,} of vllm.max_model_len"
    return UserMistake(Problem("vllm.max_model_len", f"{said}: raise it, or leave the prompt out"))


def unknown_token(uid: str, token: int, vocabulary: int) -> UserMistake:
    """Return the mistake of a prompt with a token that the model does not have, at which vLLM's engine dies."""
    said = f"prompt {uid} has token {token:,}, and the model knows those below {vocabulary:,} alone"
    return UserMistake(
        Problem("model", f"{said}: leave the prompt out, or use the tokenizer that the model was made for")
    )
