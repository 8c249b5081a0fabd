"""An exported folder asked as whoever is given it will ask it: transformers or llama.cpp generates, the tasks score.

Prompts, samples and measures are those of `evaluate` (accuracy.py), so that either can be compared with the other: what
is exported beside the base model, or beside the model folder that it was made of. Its tokens are drawn by their
noise, not by ours; greedy completions agree as far as roundings do.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.base import durable
from data_tools.base.declared import SEEDS, setting, with_default
from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import NEVER, Tokenizer, load_tokenizer, stop_ids, told_opening
from data_tools.evaluations.accuracy import accuracy, write_tables
from data_tools.evaluations.lines import compared_lines
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from data_tools.tasks.mix import Draw, Mix, MixConfig, check_mix, entries_of, verifiers
from data_tools.tasks.outcome import Outcomes
from data_tools.tasks.rewards import Score, Scorer
from megatron_ext.entrypoints import evaluate, export_gguf
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.settings import DTYPES
from megatron_ext.rollout.settings import Sampling
from megatron_ext.serving import gguf_vocabulary, llama_cpp

Sampled = tuple[list[int], str]  # a completion's tokens, and "stop" or "length"


@dataclass
class Config:
    """The config of the phase run_exported."""

    model: str = setting(
        "", "Hugging Face folder, as export_hf writes it", example="${phases.exported.out}", needed=True, input=True
    )
    gguf: str = setting(
        "", "folder of export_gguf: its model is asked, by llama.cpp, with the tokenizer of `model`",
        example="${phases.gguf.out}", input=True,
        keyed="if_set",
    )  # fmt: skip
    gguf_adapter: str = setting(
        "",
        "folder of export_gguf with an adapter for it",
        example="${phases.gguf_adapter.out}",
        input=True,
        keyed="if_set",
    )
    mix: MixConfig = setting(MixConfig, "the tasks whose prompts are asked, and how they are rewarded")
    dtype: str = setting("", 'type that is computed in; "" as config.json says', choices=("", *DTYPES))
    max_new_tokens: int = setting(
        16, "new tokens of a completion, at most: what grpo and generate call sampling.max_tokens",
        unit="tokens", least=1,
    )  # fmt: skip
    samples: int = setting(
        0, "samples of each prompt, at `temperature`, besides the greedy one", unit="samples", least=0
    )
    temperature: float = setting(
        1.0, "temperature of the samples; the greedy completion is always there", above=0, example=0.7
    )
    top_p: float = with_default(Sampling, "top_p", 1.0)
    batch: int = setting(8, "prompts that are generated together", unit="prompts", least=1)
    seed: int = setting(0, "noise of the samples", **SEEDS)
    compare_with: str | None = setting(
        None,
        "output of an evaluation, of the base model say, for the gain over it",
        example="${phases.base_tested.out}",
        input=True,
    )
    chat_arguments: dict[str, Any] = setting(
        dict, "variables of the chat template, where prompts are messages", example={"enable_thinking": True}, free=True
    )
    bos: str = setting(
        "", 'the token that opens a text prompt: "" as the tokenizer adds it, or never', choices=("", NEVER)
    )
    verify_limit_s: float = setting(
        10.0, "time that a verifier has for a sample, which then counts as not scorable", unit="s", above=0
    )
    verifiers: int = setting(2, "processes that score", unit="processes", least=1, keyed=False)


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs."""
    problems = check_mix(config.mix, training=False)
    if config.compare_with and not config.samples:
        problems.append(Problem("compare_with", "samples are compared, and samples is 0: give some, or leave it out"))
    if config.gguf:
        problems += llama_cpp.check_installed()
        if config.dtype:
            problems.append(Problem("dtype", "llama.cpp computes as its file says: leave dtype out, or gguf"))
    elif config.gguf_adapter:
        problems.append(Problem("gguf_adapter", "has no effect without gguf: give the folder of the model's GGUF too"))
    if ranks != 1:
        problems.append(Problem("", f"run_exported runs on 1 rank, not {ranks}"))
    return problems


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Generate and score. Write OUT/samples.jsonl, OUT/result.json and the tables, as `evaluate` does.

    Return the facts of accuracy.accuracy, `records`: Mix.counts, and what was asked: `dtype`, `quantized` (how
    config.json says that the files are), `transformers`; or `llama_cpp`, with `gguf`.
    """
    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    before = compared_lines(config.compare_with, config.samples)
    folder, entries = Path(config.model), entries_of(config.mix)
    file = _config_of(folder)
    mix, outcomes, tokenizer = Mix(entries, config.seed), Outcomes(entries), load_tokenizer(str(folder))
    draws = [mix.held_out(name, k) for name in mix.items for k in range(len(mix.items[name]))]
    encoder = PromptEncoder(tokenizer, config.chat_arguments, config.bos)
    prompts = [encoder.encode(draw.item.prompt) for draw in draws]
    longest = max(map(len, prompts), default=0)
    model: Asked = (_Gguf if config.gguf else _Model)(config, folder, tokenizer, longest + config.max_new_tokens)
    greedy: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    done = 0
    with Scorer(verifiers(entries), config.verifiers, config.verify_limit_s) as scorer:
        for first in range(0, len(draws), config.batch):
            some = slice(first, first + config.batch)
            for rows, ways in ((greedy, 0), (samples, config.samples)):
                if rows is greedy or ways:
                    rows += _rows(model, draws[some], prompts[some], ways, scorer=scorer, outcomes=outcomes)
            done += len(draws[some])
            progress(done, len(draws), "prompts")
    lines = {row["prompt_id"]: evaluate.line_of(row) for row in greedy}
    if config.samples:
        evaluate.add_samples(lines, samples)
    result = {
        **accuracy([*lines.values()], before, [*entries]),
        "records": mix.counts(),
        **told_opening(tokenizer, config.bos),
    }
    evaluate.write_results(out, [*lines.values()], result)
    write_tables(keep, result, "at step 0")
    return {**result, **model.told(file)}


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return durable.read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserMistake(
            Problem("model", f"{folder} is no Hugging Face folder ({error}); export_hf makes one")
        ) from None


def _rows(
    model: "Asked",
    draws: Sequence[Draw],
    prompts: Sequence[list[int]],
    samples: int,
    *,
    scorer: Scorer,
    outcomes: Outcomes,
) -> Iterator[dict[str, Any]]:
    """Yield a row, with generate's keys, for each completion of these prompts: `samples` each, or (0) a greedy one."""
    pending: list[tuple[Draw, str, list[int], str, Score | Future[Score]]] = []
    for draw, sampled in zip(draws, model.completions(prompts, samples)):
        for tokens, finish in sampled:
            text = model.text(tokens, finish)
            cut_off = outcomes.cut_off(draw.entry, draw.item) if finish != "stop" else None
            pending.append((draw, text, tokens, finish, cut_off or scorer.submit(draw.entry, draw.item, text, finish)))
    for draw, text, tokens, finish, scored in pending:
        verdict = scored.result() if isinstance(scored, Future) else scored
        best = outcomes.best(draw.entry, draw.item)
        yield {
            "prompt_id": draw.item.uid,
            "completion": text,
            "finish": finish,
            "tokens": len(tokens),
            "correct": outcomes.is_right(draw.entry, draw.item, verdict.reward, verdict.parts),
            "answer": verdict.answer,
            "reward": verdict.reward,
            **({} if best is None else {"best": best}),
            "note": verdict.note,
            "task": draw.entry,
        }


class Asked(Protocol):
    """What generates."""

    def text(self, tokens: list[int], finish: str) -> str:
        """Return a completion's text without the token that ended it."""

    def completions(self, prompts: Sequence[list[int]], samples: int) -> list[list[Sampled]]:
        """Return for each prompt `samples` completions, or (0) the greedy one."""

    def told(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts of what was asked, whose config.json is `file`."""


class _Gguf:
    """llama.cpp's model of a GGUF file."""

    def __init__(self, config: Config, folder: Path, tokenizer: Tokenizer, positions: int):
        model, adapter = Path(config.gguf) / export_gguf.MODEL, Path(config.gguf_adapter) / export_gguf.ADAPTER
        for key, path in {"gguf": model, "gguf_adapter": adapter}.items():
            if getattr(config, key) and not path.is_file():
                raise UserMistake(Problem(key, f"{path.parent} has no {path.name}; export_gguf makes one"))
        if problems := gguf_vocabulary.check(model, tokenizer, str(folder)):
            raise UserMistake(problems)
        stops = stop_ids(folder, tokenizer)
        self._model = llama_cpp.LlamaCpp(model, adapter if config.gguf_adapter else None, positions, stops)
        self._config, self._tokenizer = config, tokenizer

    def text(self, tokens: list[int], finish: str) -> str:
        return self._tokenizer.decode(tokens)

    def completions(self, prompts: Sequence[list[int]], samples: int) -> list[list[Sampled]]:
        config, found = self._config, []
        for prompt in prompts:
            ways = [
                llama_cpp.Way(config.temperature, config.top_p, seed_of(config.seed, prompt, k), config.max_new_tokens)
                for k in range(samples)
            ] or [llama_cpp.Way(0.0, 1.0, 0, most=config.max_new_tokens)]
            found.append([self._model.complete(prompt, way) for way in ways])
        return found

    def told(self, file: Mapping[str, Any]) -> dict[str, Any]:
        return {"dtype": "gguf", "quantized": None, "llama_cpp": self._model.version}


def seed_of(seed: int, prompt: Sequence[int], sample: int) -> int:
    """Return llama.cpp's seed, 32 bits, of a sample: of no other prompt or sample."""
    said = f"{seed} {sample} {' '.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "little")


class _Model:
    """transformers' model of a folder, on the GPU where there is one."""

    def __init__(self, config: Config, folder: Path, tokenizer: Tokenizer, positions: int):
        import torch
        import transformers

        dtype = getattr(torch, config.dtype) if config.dtype else "auto"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        self._model = model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps it without its types
        # What the folder's generation_config.json would add, such as Qwen2.5's repetition_penalty, is no part of the
        # distribution that was trained; the tokens that it says end a completion are in stop_ids.
        self._model.generation_config = transformers.GenerationConfig()
        self._config, self._tokenizer, self._stops = config, tokenizer, stop_ids(folder, tokenizer)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.version = transformers.__version__
        torch.manual_seed(config.seed)

    def text(self, tokens: list[int], finish: str) -> str:
        return self._tokenizer.decode(tokens[:-1] if finish == "stop" else tokens)

    def completions(self, prompts: Sequence[list[int]], samples: int) -> list[list[Sampled]]:
        import torch

        config, width = self._config, max(map(len, prompts))
        pad = self._tokenizer.pad_id if self._tokenizer.pad_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        way = (
            {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
            if samples
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        with torch.no_grad():
            found = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=config.max_new_tokens,
                num_return_sequences=max(samples, 1),
                eos_token_id=sorted(self._stops) or None,
                pad_token_id=pad,
                **way,
            )
        ended = [self._ended(row) for row in found[:, width:].tolist()]
        return [ended[first : first + max(samples, 1)] for first in range(0, len(ended), max(samples, 1))]

    def told(self, file: Mapping[str, Any]) -> dict[str, Any]:
        quantized = (file.get("quantization_config") or {}).get("quant_method")
        return {"dtype": self.dtype, "quantized": quantized, "transformers": self.version}

    def _ended(self, tokens: list[int]) -> Sampled:
        for place, token in enumerate(tokens):
            if token in self._stops:
                return tokens[: place + 1], "stop"
        return tokens, "length"


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
