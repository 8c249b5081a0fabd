"""vLLM's offline engine as a Backend (rl/makers.py), in the environment of the phase's role, which has vLLM.

The model folder is exported once for the phase (exports.py). The engine starts when a sample has to be made, and
serves all ways of sampling of its element.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress
from data_tools.tasks.mix import Draw
from megatron_ext.foreign import exports, vllm_arguments, vllm_limits
from megatron_ext.foreign.alone import Alone
from megatron_ext.foreign.maker import JournaledMaker
from megatron_ext.foreign.vllm_engine import (
    Stepped,
    VllmCompleter,
    prompt_log_probs,
    too_little_memory,
)
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.parallel.parts import VLLM
from megatron_ext.rl.choices import choices, line
from megatron_ext.rl.makers import Maker, Work
from megatron_ext.rl.prompts import Encoding
from megatron_ext.rollout.sequence import completes
from megatron_ext.rollout.settings import SamplingSettings

_SAID = 400  # characters of an error
_AT_A_TIME = 64  # questions whose choices are asked for together
QUIET = {  # what a user may say otherwise in the profile's env.set
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns with a traceback that it has no tokenizer, which it was told
}


class Vllm(Alone):
    """The only process of an element, and vLLM's engine in it."""

    def __init__(self, config: SamplingSettings, folder: ModelFolder, keep: Path):
        self.config, self.folder, self.keep = config, folder, keep

    def start(self) -> None:
        """Refuse an environment without vLLM, and arguments that its release does not take, before any sample."""
        self.module  # noqa: B018

    @cached_property
    def module(self) -> Any:
        """The package vllm of this environment, with the arguments checked. UserMistake where there is none."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if not self.on_gpu:  # one process: what ends it ends all of it
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
            from vllm.engine.arg_utils import EngineArgs
        except ImportError as error:
            message = f"vllm: it cannot be imported here ({error}): {vllm_limits.HAS_IT}"
            raise UserMistake(Problem("backend", message)) from None
        if problems := vllm_arguments.unknown(self.config.vllm, vllm.LLM, EngineArgs, vllm.__version__):
            raise UserMistake(problems)
        return vllm

    @property
    def on_gpu(self) -> bool:
        """Whether this element has a GPU, as Slurm or the worker told it."""
        import torch

        return torch.cuda.is_available()

    @cached_property
    def engine(self) -> Stepped:
        """The engine, started. UserMistake where memory does not hold it."""
        vllm, model = self.module, exports.exported(self.folder, self.config.dtype, self.keep)
        plan = self.config.parallel
        arguments = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": self.config.dtype or self.folder.dtype,
            "seed": 0,
            "tensor_parallel_size": plan.tensor,
            "pipeline_parallel_size": plan.pipeline,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            **self.config.vllm,
        }
        try:
            llm = vllm.LLM(**arguments)
        except Exception as error:
            if told := too_little_memory(error):
                raise told from None
            if isinstance(error, (TypeError, ValueError)):  # pydantic's ValidationError is one
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"
                message = f"vLLM {vllm.__version__} does not start with {self.config.vllm} and this model ({said})"
                raise UserMistake(Problem("vllm", f"{message}: leave an argument out, or use backend auto")) from None
            raise
        return Stepped(llm, vllm.SamplingParams, _deaths())

    def maker(self, work: Work) -> Maker:
        """Return who makes the samples of `work`."""
        config = work.config
        completer = VllmCompleter(
            lambda: self.engine,
            config.sampling,
            stop_ids=work.stop_ids,
            completes=partial(completes, detokenize=work.texts.tokenizer.decode),
            model=config.model,
        )
        return JournaledMaker(work, completer)

    def likeliest(self, draws: Sequence[Draw], encoding: Encoding, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yield the line of each question whose choices are compared, from the log-probs of prompts."""
        asked = [choices(draw, encoding) for draw in draws]
        for start in range(0, len(draws), _AT_A_TIME):
            some, wanted = range(start, min(start + _AT_A_TIME, len(draws))), {}
            for number in some:
                for place, choice in enumerate(asked[number]):
                    tokens = (*choice.prompt, *choice.tokens)
                    self.engine.check(draws[number].item.uid, tokens, 1)
                    wanted[number, place] = tokens, len(choice.tokens)
            values = dict(prompt_log_probs(self.engine, wanted))
            for number in some:
                yield line(draws[number], asked[number], [values[number, k] for k in range(len(asked[number]))])
            progress(some.stop, len(draws), "prompts")

    def facts(self) -> dict[str, Any]:
        """Return which engine it is; it was not started where all samples were there already."""
        return {"engine": {"is": VLLM, "version": self.module.__version__}}


def _deaths() -> tuple[type[BaseException], ...]:
    """Return what vLLM raises where its processes ended."""
    try:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
    except ImportError:  # another release has no such names
        return ()
    return EngineDeadError, EngineGenerateError


@contextlib.contextmanager
def opened(config: SamplingSettings, folder: ModelFolder, keep: Path) -> Iterator[Vllm]:
    """Give the Backend of one element. Its engine ends with the process, if it was started."""
    backend = Vllm(config, folder, keep)
    backend.start()
    yield backend
