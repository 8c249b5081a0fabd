"""One recorded rollout drawn again, alone: do the same weights, prompt and noise still give the same tokens?

Where a task replied it is not asked again: its recorded words are given once more.
"""

from math import isnan
from pathlib import Path
from typing import Any

from data_tools.mistake import UserMistake
from data_tools.tasks.mix import turn_ends
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl import journal
from megatron_ext.rl.prompts import MixPrompts, prompts_of, stop_ids_of
from megatron_ext.rl.settings import GrpoSettings
from megatron_ext.rl.step import ROLLOUTS
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.sequence import Answer, Request, Sequence
from megatron_ext.weights import checkpoint


def replay(config: GrpoSettings, keep: Path, step: int, item: int, number: int) -> dict[str, Any]:
    """Draw sample `number` of prompt `item` again, which was drawn for the update that made `step`; in one process,
    started.

    Facts: prompt, completion and finish as recorded, tokens, and what was found: same_tokens (those before the first
    difference), differs, recorded_token and replayed_token there, the margin of that draw (how far its noise was
    from another token, as a probability), and the largest difference of log-probs before it.
    """
    entry = journal.read(keep / ROLLOUTS, step - 1).get((item, number))
    if entry is None:
        held = [k + 1 for k in journal.steps(keep / ROLLOUTS)]
        raise UserMistake(
            f"no tokens are recorded of {step}/{item}/{number}: recorded are those of steps {_ranges(held)}; "
            f"samples/step_{step:06d}.jsonl has the numbers of its prompts and samples"
        )
    folder = model_folder.open_folder(config.model)
    plan = ParallelPlan()
    if step == 1:
        parts = model_folder.load_trainable(
            folder, plan, config.lora, config.seed, dtype=config.dtype, backend=config.backend, base=config.base
        )
    else:
        weights = _weights(config, keep, step)
        parts = model_folder.load_stages(
            folder, plan, config.dtype, backend=config.backend, weights=weights, base=config.base
        )
    tokenizer, mix, encoding = prompts_of(config, folder)
    prompts = MixPrompts(mix, encoding)
    draw = prompts.item(item)
    stop_ids = stop_ids_of(folder, tokenizer)
    engine = Engine(parts[0], config.engine, config.seed, stop_ids, detokenize=tokenizer.decode)
    ends = turn_ends(mix.entries).get(draw.entry)
    request = Request(prompts.uid(draw), prompts.tokens(draw), number + 1, only=(number,), turn_ends=ends)
    (drawn,) = engine.generate([request], config.sampling, turns=AsRecorded(entry))
    same = 0
    while same < min(len(entry.tokens), len(drawn.completion)) and entry.tokens[same] == drawn.completion[same]:
        same += 1
    logprobs = drawn.model_logprobs if config.sampling.is_filtered else drawn.logprobs
    differences = (abs(a - b) for a, b in zip(entry.logprobs[:same], logprobs) if not isnan(a))
    facts = {
        "prompt": tokenizer.decode(request.prompt),
        "completion": tokenizer.decode(entry.tokens),
        "finish": entry.finish,
        "tokens": len(entry.tokens),
        "same_tokens": same,
        "differs": same < len(entry.tokens) or (bool(entry.finish) and len(drawn.completion) > same),
        "smallest_margin": min(drawn.margins[: same + 1], default=None),
        "logprob_difference": max(differences, default=0.0),
    }
    if facts["differs"]:
        facts |= {
            "recorded_token": entry.tokens[same] if same < len(entry.tokens) else None,
            "replayed_token": drawn.completion[same] if same < len(drawn.completion) else None,
            "margin": drawn.margins[same] if same < len(drawn.margins) else None,
        }
    return facts


class AsRecorded:
    """Replies as the record has them, as long as the sample is as recorded."""

    def __init__(self, entry: journal.Entry):
        self.entry = entry
        self.asked: list[Sequence] = []

    def ask(self, sequence: Sequence) -> None:
        """Hear that a sample's turn has ended."""
        self.asked.append(sequence)

    def answers(self, wait: bool) -> list[tuple[Sequence, Answer]]:
        """Return the recorded replies to what was asked."""
        asked, self.asked = self.asked, []
        return [(sequence, self._answer(sequence.completion)) for sequence in asked]

    def _answer(self, tokens: list[int]) -> Answer:
        start, recorded = len(tokens), self.entry.tokens
        if recorded[:start] != tokens:
            return Answer(None)
        if start == len(recorded):  # what ended it says what was answered; of too many turns the last reply is not kept
            note = "aborted" if self.entry.finish == "abort" else ""
            return Answer((0,) if self.entry.finish == "turns" else None, note)
        stop = start
        while stop < len(recorded) and isnan(self.entry.logprobs[stop]):
            stop += 1
        return Answer(tuple(recorded[start:stop]))


def _weights(config: GrpoSettings, keep: Path, step: int) -> Path:
    """Return the weights that drew the samples of `step`: those of the checkpoint before."""
    if config.lora.rank:
        raise UserMistake("rollouts of adapters cannot be drawn again after the first step: only whole models can")
    folder = keep / "checkpoints" / f"step_{step - 1}"
    if not (folder / "manifest.json").is_file():
        held = [1, *(kept + 1 for kept in checkpoint.steps(keep / "checkpoints"))]
        raise UserMistake(
            f"the weights of step {step - 1}, which drew these samples, are not kept: samples of steps {_ranges(held)} "
            "can be drawn again; keep_every keeps more"
        )
    return folder / "state"


def _ranges(numbers: list[int]) -> str:
    """Return numbers in words, as "1, 101 to 250"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs) or "none"
