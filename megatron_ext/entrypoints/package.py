"""A model folder to hand on: weights, adapter and GGUF files, what Ollama and vLLM need, a card with its lineage.

    config.json, *.safetensors, tokenizer…    as export_hf wrote them
    adapter/                                  PEFT's format
    model.gguf, adapter.gguf                  of export_gguf
    Modelfile, Modelfile.adapter              for `ollama create NAME -f Modelfile`
    serve_vllm.sh, serve_vllm_adapter.sh
    README.md                                 the card

`push: true` puts the folder on the Hub, into a private repository.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import datetime
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.declared import setting
from data_tools.base.inside import files, inside
from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import Tokenizer, is_path, load_tokenizer, stop_ids
from data_tools.evaluations import accuracy
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.entrypoints import export_gguf
from megatron_ext.lora import peft_config, peft_format
from megatron_ext.models.registry import model_type, read_config
from megatron_ext.parallel.plan import Site
from megatron_ext.serving import card, hub, modelfile, turns
from megatron_ext.serving.card import Step

CARD, MODELFILE, ADAPTER_MODELFILE = "README.md", "Modelfile", "Modelfile.adapter"
SERVE, SERVE_ADAPTER = "serve_vllm.sh", "serve_vllm_adapter.sh"
NOT_TAKEN = ("conversion.json",)  # names folders of the cluster, which concern nobody else
BASE_CARD = "README.base.md"
MADE = (MODELFILE, ADAPTER_MODELFILE, SERVE, SERVE_ADAPTER, BASE_CARD)
BASE_OF_ADAPTER = "base_model_name_or_path"
DAYS = ("2001-02-03", "2004-05-06")  # two days, to see whether a template writes one


@dataclass
class Config:
    """The config of the phase package."""

    model: str = setting(
        "", "Hugging Face folder, as export_hf writes it", example="${phases.exported.out}", needed=True, input=True
    )
    adapter: str = setting(
        "",
        "PEFT folder of the same training (export_hf with adapter: peft)",
        example="${phases.adapter.out}",
        input=True,
    )
    gguf: list[str] = setting(
        list, "folders of export_gguf: of the model, of the adapter", example=["${phases.gguf.out}"], input=True
    )
    results: list[str] = setting(
        list, "folders of evaluate or run_exported, for the card", example=["${phases.after.out}"], input=True
    )
    name: str = setting("", 'what the model is called; "" is its model_type', example="my-model", free=True)
    base: str = setting(
        "",
        "name on the Hub of the model that it was trained from; of a folder the card says nothing",
        example="Qwen/Qwen2.5-0.5B",
        free=True,
    )
    ollama_base: str = setting(
        "", "what Ollama calls that model, for FROM with an adapter: gpt-oss:20b", example="gpt-oss:20b", free=True
    )
    license: str = setting("", "license on the card, as the Hub spells it: apache-2.0", example="apache-2.0", free=True)
    date: str = setting(
        "", 'what the chat template says today is, YYYY-MM-DD; "" is the day, where the template says it as that',
        example="2026-07-01",
        free=True,
    )  # fmt: skip
    chat_arguments: dict[str, Any] = setting(
        dict, "variables of the chat template: reasoning_effort: low", example={"reasoning_effort": "low"}, free=True
    )
    temperature: float = setting(1.0, "of completions, for Ollama", above=0, example=0.7)
    top_p: float = setting(
        1.0, "share of the likeliest tokens that are drawn from, for Ollama", above=0, most=1, example=0.95
    )
    top_k: int = setting(
        0, "likeliest tokens that are drawn from, for Ollama; 0: all", unit="tokens", least=0, example=50
    )
    context: int = setting(
        0,
        "tokens that Ollama and vLLM keep room for; 0 leaves it to them (Ollama cuts at 4,096)",
        unit="tokens",
        least=0,
        example=32768,
    )
    repo: str = setting("", "repository on the Hub, OWNER/NAME", example="me/my-model", free=True)
    push: bool = setting(False, "upload the folder to `repo`, which is private")


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs."""
    problems = hub.check(config.repo, config.push)
    try:
        datetime.date.fromisoformat(config.date or DAYS[0])
    except ValueError:
        problems.append(Problem("date", f"{config.date!r} is no date YYYY-MM-DD"))
    if config.ollama_base and not config.gguf:
        said = (
            "an adapter for Ollama is a GGUF file: give gguf a folder of export_gguf with the adapter, or leave it out"
        )
        problems.append(Problem("ollama_base", said))
    for key, text in {"name": config.name, "ollama_base": config.ollama_base}.items():
        if not text.isprintable():
            problems.append(Problem(key, f"{text!r} has characters that no line of a file shows: leave them out"))
    if ranks != 1:
        problems.append(Problem("", f"package runs on 1 rank, not {ranks}"))
    return problems


def run(
    config: Config, out: Path, keep: Path, progress: Progress = silent, lineage: Sequence[Step] = ()
) -> dict[str, Any]:
    """Fill OUT, and upload it where that is asked for. `lineage`: the phases that the model was made by.

    Return the facts: name, files, `template` (whether Ollama gets one, and what is to know of it), commit.
    """
    problems = check(config, 1)
    family, dims, wrong = read_config(Path(config.model))
    if problems or wrong or family is None:
        raise UserMistake(problems + wrong)
    name = config.name or model_type(family, dims)
    if is_local(config.base):
        config = replace(config, base="")
    results = _results(config, lineage)
    rank = _vllm_rank(config)
    told = _copy(config, out)
    tokenizer = load_tokenizer(str(out))
    template, note = _template(config, tokenizer)
    _modelfiles(config, out, tokenizer, template, note=note, is_gpt_oss=family.name == "gpt_oss", told=told)
    _vllm(config, out, name, dims.dtype, rank=rank, told=told)
    facts: card.Facts = {
        "name": name,
        "description": _description(config, model_type(family, dims), lineage),
        "base": config.base,
        "license": config.license,
        "tags": ["afterok", *(["lora"] if config.adapter else [])],
        "files": told,
    }
    durable.write_file(out / CARD, card.model_card(facts, results, lineage))
    durable.fsync_tree(out)
    progress(1, 2 if config.push else 1, "steps")
    commit = hub.upload(out, config.repo, f"{name}, packaged by afterok") if config.push else ""
    return {"name": name, "files": sorted(told), "template": note or "as the tokenizer's", "commit": commit}


def _description(config: Config, family: str, lineage: Sequence[Step]) -> str:
    trained = [step for step in lineage if step["uses"] in ("sft", "grpo")]
    by = f", trained by {' and '.join(step['uses'] for step in trained)}" if trained else ""
    origin = f" from {config.base}" if config.base else ""
    return f"A {family} model{by}{origin}."


def _copy(config: Config, out: Path) -> dict[str, str]:
    """Put all files in place: hard links, or copies where the filesystem has none. Return what the card says."""
    told = {}
    for path in files(Path(config.model)):
        if path.name in MADE:  # of other settings than these
            said = f"{config.model} has {path.name}, as package makes it: give the folder that was packaged"
            raise UserMistake(Problem("model", said))
        if path.name not in NOT_TAKEN:
            # The card of the model that this one was made of is not this one's.
            _link(inside(Path(config.model), path.name), out / (path.name if path.name != CARD else BASE_CARD))
    told["*.safetensors"] = "the weights, for transformers and vLLM"
    if config.adapter:
        _copy_adapter(config, out / "adapter")
        told["adapter/"] = "the adapter alone, in PEFT's format"
    for folder in config.gguf:
        found = [name for name in (export_gguf.MODEL, export_gguf.ADAPTER) if (Path(folder) / name).is_file()]
        if not found:
            raise UserMistake(Problem("gguf", f"{folder} has neither {export_gguf.MODEL} nor {export_gguf.ADAPTER}"))
        for name in found:
            _link(inside(Path(folder), name), out / name)
            told[name] = "for llama.cpp and Ollama" + (": the adapter alone" if name == export_gguf.ADAPTER else "")
    return told


def _copy_adapter(config: Config, out: Path) -> None:
    """Put the adapter's files in place. Its base is a name on the Hub or none: a folder of the cluster concerns nobody
    else."""
    out.mkdir()
    for path in files(Path(config.adapter)):
        file = inside(Path(config.adapter), path.name)
        if path.name == peft_config.PEFT_CONFIG and is_local((said := durable.read_json(file)).get(BASE_OF_ADAPTER)):
            durable.write_json(out / path.name, {**said, BASE_OF_ADAPTER: config.base or None})
        else:
            _link(file, out / path.name)


def is_local(base: Any) -> bool:
    """Return whether the name of a base model is that of a folder, "" too."""
    return isinstance(base, str) and (is_path(base) or os.path.exists(base) or not base)


def _link(source: Path, target: Path) -> None:
    if target.exists():
        raise UserMistake(Problem("gguf", f"{target.name} is given twice: {source} is one of them"))
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _template(config: Config, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return (Ollama's template, what is to know of it); "" where there is none."""
    if not tokenizer.chat_template:
        return "{{ .Prompt }}", "the tokenizer has no chat template, so prompts go to the model as they are"
    found = [turns.find(_rendering(config, tokenizer, day)) for day in DAYS]
    if found[0] is None:
        return "", "the tokenizer's chat template does more than write something around each turn: none for Ollama"
    template = found[0].go_template(DAYS[0])
    if found[1] is None or found[1].go_template(DAYS[1]) != template:
        return "", "the tokenizer's chat template writes the day in a way of its own: pin it (date)"
    lost = [] if found[0].system else ["it has no place for a system message"]
    lost += [] if found[0].keeps_edges else ["the tokenizer's takes spaces off the ends of a content, Ollama does not"]
    lost += (
        [] if found[0].keeps_thoughts else ["the tokenizer's takes thoughts out of earlier answers, Ollama does not"]
    )
    return template, "; ".join(lost)


def _rendering(config: Config, tokenizer: Tokenizer, day: str) -> turns.Render:
    encoder = PromptEncoder(tokenizer, config.chat_arguments, day=config.date or day)

    def render(messages: turns.Messages) -> str:
        try:
            return encoder.text([dict(message) for message in messages])
        except UserMistake as mistake:
            raise ValueError(str(mistake)) from None

    return render


def _modelfiles(
    config: Config, out: Path, tokenizer: Tokenizer, template: str, *, note: str, is_gpt_oss: bool, told: dict[str, str]
) -> None:
    stops = [tokenizer.decode([token]) for token in sorted(stop_ids(out, tokenizer))]
    sampling = modelfile.Sampling(config.temperature, config.top_p, config.top_k)
    more = [f"Template: {note}"] if note else []
    merged = modelfile.MERGED_NOTE + (modelfile.GPT_OSS_NOTE if is_gpt_oss else "")
    about = {
        MODELFILE: (export_gguf.MODEL, f"./{export_gguf.MODEL}", "", merged),
        ADAPTER_MODELFILE: (
            export_gguf.ADAPTER, config.ollama_base, f"./{export_gguf.ADAPTER}", modelfile.ADAPTER_NOTE,
        ),
    }  # fmt: skip
    for name, (needed, origin, adapter, says) in about.items():
        if needed in told and origin:
            text = modelfile.modelfile(
                origin, adapter, template, stops=stops, sampling=sampling, context=config.context, notes=[says, *more]
            )
            durable.write_file(out / name, text)
            told[name] = f"`ollama create NAME -f {name}`. {says}"


def _vllm_rank(config: Config) -> int:
    """Return the rank of the adapter, 0 where vLLM has no such adapter or none is given. Raise UserMistake for none.

    Of experts and router, which are parameters, vLLM reads another order (vllm#52198).
    """
    if not config.adapter:
        return 0
    adapter, problems = peft_config.read(Path(config.adapter))
    if not problems and not (Path(config.adapter) / peft_format.TENSORS).is_file():
        problems = [Problem("adapter", f"{config.adapter} has no {peft_format.TENSORS}; export_hf makes one")]
    if problems or adapter is None:
        raise UserMistake(problems)
    return 0 if adapter.parameters or adapter.config.rank > modelfile.VLLM_RANKS[-1] else adapter.config.rank


def _vllm(config: Config, out: Path, name: str, dtype: str, *, rank: int, told: dict[str, str]) -> None:
    scripts = {SERVE: modelfile.vllm_command(name, dtype, config.context)}
    if rank and config.base:
        scripts[SERVE_ADAPTER] = modelfile.vllm_command(name, dtype, config.context, base=config.base, rank=rank)
    for file, text in scripts.items():
        durable.write_file(out / file, text)
        (out / file).chmod(0o755)
        told[file] = "serves it with vLLM" + (", the base with the adapter" if file == SERVE_ADAPTER else "")


def _results(config: Config, lineage: Sequence[Step]) -> Mapping[str, Mapping[str, Any]]:
    """Return the results of the evaluations by phase: RUN/PHASE/KEY/work/NAME/result.json. Outside of a run they go by
    their folders' names."""
    phases = {step["key"]: step["phase"] for step in lineage}
    folders = [Path(folder) for folder in config.results]
    known = [[phases[part] for part in folder.parts if part in phases] for folder in folders]
    names = [found[-1] if found else folder.name for found, folder in zip(known, folders)]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{name}" for name, folder in zip(names, folders)]
    if len(set(names)) < len(names):
        raise UserMistake(
            Problem("results", f"{', '.join(names)}: rename folders, so that the card can tell them apart")
        )
    results = {}
    for name, folder in zip(names, folders):
        try:
            results[name] = durable.read_json(folder / "result.json")
            accuracy.headline(results[name])
        except (OSError, ValueError) as error:
            raise UserMistake(Problem("results", f"{folder} has no evaluation ({error})")) from None
        except (AttributeError, LookupError, TypeError) as error:
            said = f"{folder / 'result.json'} is no evaluation's ({error!r}): give a folder of evaluate or run_exported"
            raise UserMistake(Problem("results", said)) from None
    return results


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
