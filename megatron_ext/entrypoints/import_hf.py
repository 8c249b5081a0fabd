"""A Hugging Face checkpoint, from a folder or the hub, as a model folder."""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base import durable
from data_tools.base.declared import setting
from data_tools.base.inside import inside
from data_tools.chats.char_tokenizer import characters_of
from data_tools.chats.tokenizer import has_template
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.lora import peft_config
from megatron_ext.parallel.settings import DTYPES

if TYPE_CHECKING:
    from megatron_ext.models.registry import Family
    from megatron_ext.weights.convert import Tensors


@dataclass
class Config:
    """The config of the phase import_hf."""

    source: str = setting(
        "",
        "a Hugging Face folder or a hub name such as Qwen/Qwen2.5-0.5B",
        example="Qwen/Qwen2.5-0.5B",
        needed=True,
        input="hub",
    )
    revision: str = setting(
        "",
        "revision of a hub name: a commit, so that the key names the content",
        example="060db6499f32faf8b98477b0a26969ef7d8b9987",
        free=True,
    )
    dtype: str = setting("", 'type of the weights; "" keeps that of each tensor', choices=("", *DTYPES))
    megatron: str = setting(
        "",
        "Megatron-LM's checkpoint that has the weights: legacy `torch`, or `torch_dist`",
        example="checkpoint/release",
        input=True,
    )
    model_tag: str = setting(
        "", "folder of nanochat's own checkpoint below `source`, such as d32", example="d32", free=True
    )
    step: int = setting(-1, "step of nanochat's own checkpoint; -1: the last", unit="steps", least=-1)
    adapter: str = setting("", "PEFT folder of a LoRA for this model", example="my_adapter", input=True)
    tokenizer: str = setting(
        "",
        "folder whose tokenizer files go along, where `source` has none; or of nanochat's tokenizer.pkl",
        example="my_tokenizer",
        input=True,
    )


def check(config: Config, ranks: int) -> list[Problem]:
    """Return what can be refused before anything runs."""
    from megatron_ext.models.registry import read_config

    problems = []
    if (Path(config.source) / "config.json").is_file():
        problems += read_config(Path(config.source))[2]
    for folder in (config.source, config.tokenizer):
        problems += _leading_out(Path(folder)) if folder and Path(folder).is_dir() else []
    if config.adapter:
        problems += peft_config.read(Path(config.adapter))[1]
    if (beside := Path(config.source) / peft_config.PEFT_CONFIG).is_file() and not _same(config):
        remedy = f"name the folder as `adapter` too, or remove {beside.name}"
        problems.append(Problem(str(beside), f"transformers would load the model with this adapter: {remedy}"))
    if ranks != 1:
        problems.append(Problem("", f"import_hf runs on 1 rank, not {ranks}: any layout loads what it writes"))
    return problems


def _leading_out(folder: Path) -> list[Problem]:
    """Refuse files of a folder that are links out of it: they would be copied."""
    from megatron_ext.model_folders.model_folder import files_beside_weights

    try:
        files_beside_weights(folder)
    except UserMistake as mistake:
        return mistake.problems
    return []


def _same(config: Config) -> bool:
    """Return whether the adapter lies beside the model."""
    return bool(config.adapter) and Path(config.adapter).resolve() == Path(config.source).resolve()


def forecast(config: Config, forecasts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what of the model folder is known before it is made: config.json of the source, also of a hub name that is
    in the cache of this machine, and whether there is a chat template. `forecasts` are those of the folders
    upstream."""
    upstream = forecasts.get(config.source, {})
    template = _template(config, upstream.get("chat_template"))
    if upstream:
        return {**upstream, "chat_template": template}
    file = Path(config.source) / "config.json"
    try:
        path = inside(file.parent, file.name) if file.is_file() else _cached(config.source, config.revision)
        known = {"chat_template": template, "characters": characters_of(file.parent)}
        return {"hf_config": durable.read_json(path), **known} if path else {}
    except (OSError, ValueError, UserMistake):  # what is wrong with it, `check` says
        return {}


def _template(config: Config, forecast: bool | None) -> bool | None:
    """Return whether the model folder will have a chat template; None where that is not known. Files of the source go
    over those of `tokenizer`."""
    from megatron_ext.models.nanochat import tokenizer as nanochat_tokenizer

    folders = [Path(name) for name in (config.source, config.tokenizer) if name]
    if any(map(nanochat_tokenizer.has_own, folders)):
        return True
    if not folders:
        return None
    own = has_template(folders[0])
    if own is None:  # a checkpoint without a tokenizer, one that is yet to be made, or a name of the hub
        own = forecast
        if not folders[0].is_dir() and (cached := _cached(config.source, config.revision)):
            own = has_template(cached.parent)
    if own or not config.tokenizer:
        return own
    given = has_template(Path(config.tokenizer))
    return given if own is None or own == given else None


def _cached(source: str, revision: str) -> Path | None:
    """Return config.json of a hub name, where an earlier download left it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, "config.json", revision=revision or None)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def fetch(source: str, revision: str) -> Path:
    """Return the folder of `source`; a hub name is downloaded, or found in the cache.

    Raise UserMistake where it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise UserMistake(Problem("source", f"{source} is no folder, and no hub name of the form org/model"))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=["original/*", "consolidated*"],  # the same weights in the format of their authors
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserMistake(
            Problem(
                "source",
                f"{source}{'@' + revision if revision else ''} cannot be fetched ({reason}); download it on "
                f"a machine with internet and name the folder",
            )
        ) from None


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Import the checkpoint in this process, and return the facts of `finish`."""
    share(config, out, progress)
    return finish(config, [out], out)


def share(config: Config, out: Path, progress: Progress = silent, index: int = 0, count: int = 1) -> int:
    """Convert every `count`-th tensor, for `finish`. Return how many these are."""
    from megatron_ext.weights import convert

    source = _source(config)
    rules = convert.checked_rules(source.tensors, source.family, source.dims, source.where)
    convert.import_share(source.tensors, rules, out, dtype=config.dtype, index=index, count=count, progress=progress)
    return len(rules[index::count])


def finish(config: Config, parts: list[Path], out: Path) -> dict[str, Any]:
    """Join all shares to one model folder.

    Return the facts: weights_digest, parameters, dtype, dtype_changes, family.
    """
    from megatron_ext.model_folders import model_folder
    from megatron_ext.models.nanochat import checkpoint as nanochat
    from megatron_ext.models.nanochat import tokenizer as nanochat_tokenizer
    from megatron_ext.models.registry import model_type
    from megatron_ext.weights import convert

    source = _source(config)
    family, hf, dtype = source.family, out / "hf", config.dtype or source.dims.dtype
    hf.mkdir(exist_ok=True)
    for folder in (config.tokenizer, source.files):
        if folder and nanochat_tokenizer.has_own(Path(folder)):
            nanochat_tokenizer.convert(Path(folder), hf)
        elif folder:
            model_folder.copy_hf_files(Path(folder), hf)
    if source.config:
        durable.write_json(hf / "config.json", source.config)
    ledger = convert.finish_import(parts, out, hf, {"family": family.name, "source": config.source})
    digest = ledger["weights_digest"]
    if isinstance(source.tensors, nanochat.NanochatTensors):
        nanochat.keep_origin(hf, source.meta, source.tensors, digest)
    model_folder.describe(out, family, step=0, weights_digest=digest, dtype=dtype)
    if config.adapter:
        digest = model_folder.adopt(out, Path(config.adapter))
    shapes = {key: of["shape"] for entry in ledger["tensors"].values() for key, of in entry["keys"].items()}
    return {
        "weights_digest": digest,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": dtype,
        "dtype_changes": ledger["dtype_changes"],
        "family": model_type(family, source.dims),
    }


@dataclass(frozen=True)
class Source:
    """A checkpoint that is understood."""

    family: "Family"
    dims: Any  # of the family
    tensors: "Tensors"
    where: str
    files: Path | None = None  # folder of config.json and the tokenizer
    config: dict[str, Any] = field(default_factory=dict)  # config.json, where there is no file
    meta: Path = Path()  # nanochat's own, whose config that is


def _source(config: Config) -> Source:
    """Open the checkpoint that is imported. Raise UserMistake where it is not understood."""
    from megatron_ext.models.nanochat import checkpoint as nanochat
    from megatron_ext.models.registry import Family, read_config
    from megatron_ext.weights import megatron_dist
    from megatron_ext.weights.hf_files import HfTensors
    from megatron_ext.weights.legacy import LegacyTensors

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    folder = fetch(config.source, config.revision)
    if not (folder / "config.json").is_file() and (found := nanochat.find(folder, config.model_tag, config.step)):
        model, meta = found
        family, file = Family("nanochat"), nanochat.config_of(meta, "float32")
        tensors = nanochat.NanochatTensors(model, file["vocab_size"])
        if (head := "lm_head.weight") in tensors.shapes():  # else it is named with all that is missing
            file |= {key: tensors.dtype(head) for key in ("dtype", "torch_dtype") if key in file}
        own, problems = family.config.read(file, f"{meta} with {model.name}")
        if problems:
            raise UserMistake(problems)
        return Source(family, own, tensors, str(model), config=file, meta=meta)
    understood, dims, problems = read_config(folder)
    if problems or understood is None:
        raise UserMistake(problems)
    if config.megatron:
        reader = megatron_dist.DistTensors if megatron_dist.is_one(Path(config.megatron)) else LegacyTensors
        theirs = reader(Path(config.megatron), understood.mapping.rules(dims), dims)
        return Source(understood, dims, theirs, config.megatron, files=folder)
    return Source(understood, dims, HfTensors(folder), str(folder), files=folder)


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
