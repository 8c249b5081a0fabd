"""Samples of an OpenAI-compatible server: backend openai as a Backend (rl/makers.py). One process, no torch.

Many requests are under way together, each for one sample of one prompt, so that each is recorded for itself. They are
coroutines of one thread: who closes the stream of answers has all that is under way given up at once, which a server
sees, and stops computing.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from typing import Any

from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress
from data_tools.tasks.mix import Draw
from megatron_ext.foreign import client, surroundings
from megatron_ext.foreign.alone import Alone
from megatron_ext.foreign.answers import Answer, Refused, messages_of
from megatron_ext.foreign.client import Client, Question
from megatron_ext.foreign.maker import Ask, Completion, JournaledMaker
from megatron_ext.parallel.parts import OPENAI
from megatron_ext.rl.makers import Maker, Work
from megatron_ext.rl.prompts import Encoding
from megatron_ext.rollout.endpoint import CHAT, WITH_STOP
from megatron_ext.rollout.settings import SamplingSettings

# What came, or why nothing does, and what is set once that is recorded.
Answers = asyncio.Queue[tuple[Completion | BaseException, asyncio.Event]]
_NAP_S = 0.2  # between two questions whether to stop


class Endpoint(Alone):
    """The server, for one phase's element."""

    def __init__(self, config: SamplingSettings, key: str):
        self.config, self.endpoint, self.key = config, config.endpoint, key
        self.checked = False  # whether the server was asked for its models
        self.told: Counter[str] = Counter()  # requests, those sent again by reason, tokens of prompts and answers
        self.ran: set[tuple[str, str]] = set()  # models and fingerprints that answered

    def maker(self, work: Work) -> Maker:
        """Return who asks for the samples of `work`, records and scores them."""
        return JournaledMaker(work, Asker(self, work))

    def likeliest(self, draws: Sequence[Draw], encoding: Encoding, progress: Progress) -> Iterator[dict[str, Any]]:
        """Raise UserMistake: `plan` refuses tasks whose choices are compared."""
        raise UserMistake(Problem("backend", "openai tells no likelihood of choices"))

    def facts(self) -> dict[str, Any]:
        """Return what the element's facts say of the server: what this attempt asked of it, and who answered."""
        ran = [{"model": model, "fingerprint": fingerprint} for model, fingerprint in sorted(self.ran)]
        at = {"url": self.endpoint.url, "model": self.endpoint.model}
        return {"engine": {"is": OPENAI, **at}, "endpoint": {**at, "ran": ran, **self.told}}


class Asker:
    """Asks the server for completions, in one way of sampling: a Completer."""

    def __init__(self, backend: Endpoint, work: Work):
        self.backend, self.endpoint, self.work = backend, backend.endpoint, work

    def complete(self, asks: Sequence[Ask]) -> Generator[Completion | None, None, None]:
        """Yield the completion of each, as they end; None, often, where none has. Raise UserMistake where the server
        refuses one, or does not answer."""
        if not asks:
            return
        with asyncio.Runner() as runner:
            answers: Answers = asyncio.Queue()
            task = runner.get_loop().create_task(self._all(asks, answers))
            try:
                left = len(asks)
                while left:
                    came, recorded = runner.run(_next(answers))
                    if isinstance(came, BaseException):
                        raise came
                    left -= came is not None
                    yield came
                    recorded.set()
                    if came is not None and answers.empty():
                        yield None
            finally:
                runner.run(_ended(task))

    async def _all(self, asks: Sequence[Ask], answers: Answers) -> None:
        """Ask for each, so many at a time, and put into `answers` what comes; what goes wrong too.

        The next one is asked for once the answer is recorded: a kill costs no more than what goes together.
        """
        waiting = iter(asks)

        async def one_after_the_other(asked: Client) -> None:
            for ask in waiting:
                recorded = asyncio.Event()
                answers.put_nowait((await self._completion(asked, ask), recorded))
                await recorded.wait()

        try:
            async with self._client() as asked, asyncio.TaskGroup() as group:
                for _ in range(min(self.endpoint.concurrency, len(asks))):
                    group.create_task(one_after_the_other(asked))
        except BaseExceptionGroup as errors:
            answers.put_nowait((errors.exceptions[0], asyncio.Event()))
        except Exception as error:
            answers.put_nowait((error, asyncio.Event()))

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[Client]:
        """Give the client, which has asked for the server's models once."""
        async with Client(self.endpoint, self.backend.key) as asked:
            try:
                if not self.backend.checked:
                    await asked.check_model()
                    self.backend.checked = True
                yield asked
            finally:
                self.backend.told.update({f"again: {why}": count for why, count in asked.tried_again.items()})

    async def _completion(self, asked: Client, ask: Ask) -> Completion:
        question = self._question(ask)
        try:
            answer = await asked.ask(question)
        except Refused as error:
            raise client.refused_answer(question, error) from None
        self._count(answer)
        return completion_of(ask, answer)

    def _question(self, ask: Ask) -> Question:
        """Return what a sample is asked with. Raise UserMistake for a prompt that no server is sent."""
        config, prompt = self.work.config, ask.draw.item.prompt
        name, where = f"prompt {ask.draw.item.uid}", f"mix.entries.{ask.draw.entry}"
        if self.endpoint.api == CHAT:
            try:
                prompt = messages_of(prompt)
            except Refused as error:
                raise UserMistake(Problem(where, f"{name}: {error}")) from None
        elif not isinstance(prompt, str):
            raise UserMistake(Problem(where, f"{name} is messages, which api completions has not: endpoint.api: chat"))
        sent = client.request(
            self.endpoint, prompt, sampling=config.sampling, seed=ask.seed, arguments=config.chat_arguments
        )
        cut = () if WITH_STOP in self.endpoint.takes else tuple(config.sampling.stop_strings)
        return Question(f"{name} ({where})", sent, len(str(prompt)), config.sampling.max_tokens, cut)

    def _count(self, answer: Answer) -> None:
        counts = {"requests": 1, "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens}
        self.backend.told.update(counts)
        self.backend.ran.add((answer.model, answer.fingerprint))


def completion_of(ask: Ask, answer: Answer) -> Completion:
    """Return an answer as the completion of what was asked."""
    told: dict[str, Any] = {"ran": answer.model, "fingerprint": answer.fingerprint}
    told |= {"prompt_tokens": answer.prompt_tokens, "logprobs": answer.logprobs}
    return Completion(
        ask.item,
        ask.number,
        [-1] * answer.tokens,
        [0.0] * answer.tokens,
        answer.finish,
        text=answer.text,
        note=answer.note,
        beside={name: value for name, value in told.items() if value},
    )


async def _next(answers: Answers) -> "tuple[Completion | BaseException | None, asyncio.Event]":
    """Return what has come, and whom to tell that it is recorded; None where nothing comes for a moment."""
    try:
        return await asyncio.wait_for(answers.get(), _NAP_S)
    except TimeoutError:
        return None, asyncio.Event()


async def _ended(task: "asyncio.Task[None]") -> None:
    """Give up what is under way, and wait until it is."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.contextmanager
def opened(config: SamplingSettings) -> Iterator[Endpoint]:
    """Give the server as a Backend. Raise UserMistake where client library or key are not there, or the
    environment keeps the library from starting."""
    client.check_installed()
    surroundings.check()
    yield Endpoint(config, client.key_of(config.endpoint))
