"""Datasets of the Hugging Face hub, as the files that they are: those of the local cache, since compute nodes have no
internet. `hf download NAME --repo-type dataset` on a machine with internet fills it.

    org/name[@revision][:glob]        openai/gsm8k:main/train-*.parquet

Models and tokenizers stand beside them, as `models/org/name[@revision]`, where it is asked what the cache lacks.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from data_tools.mistake import UserMistake

MODEL = "models/"  # begins a model or a tokenizer among datasets
_SPEC = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?")
_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".csv")
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "state.json")


def is_dataset(spec: str) -> bool:
    """Return whether the spec is well formed."""
    return _SPEC.fullmatch(spec) is not None


def is_hub_name(text: str) -> bool:
    """Return whether a text reads org/name and does not look like a path."""
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~", "/"))


def cache() -> Path:
    """Return the folder of the hub's cache that this process looks into."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def dataset_files(spec: str, folder: Path | None = None) -> list[Path]:
    """Return the data files of a dataset that match, by name, in the cache `folder` (None: this process's). Raise
    UserMistake when it is not there or none matches."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserMistake(f"{spec!r} names no dataset of the hub: write org/name, org/name@revision or org/name:glob")
    name, revision, glob = match.groups()
    try:
        folder = Path(
            snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True, cache_dir=folder)
        )
    except LocalEntryNotFoundError:
        command = f"hf download {name} --repo-type dataset{f' --revision {revision}' if revision else ''}"
        remedy = f"run `{command}` on a machine with internet, or give files in source.inputs"
        raise UserMistake(f"dataset {spec} is not in the hub cache; {remedy}") from None
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _NO_DATA)
    data = [path for path in paths if path.name.endswith(_SUFFIXES)]
    files = [path for path in data if fnmatch.fnmatch(str(path.relative_to(folder)), glob or "*")]
    if not files:
        there = ", ".join(str(path.relative_to(folder)) for path in data[:8]) or "no data files"
        raise UserMistake(f"dataset {spec}: no file matches; it has {there}")
    return files


def _find_model(spec: str, folder: Path | None) -> None:
    """Raise UserMistake where the cache has no file of a model or tokenizer `models/org/name[@revision]`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = spec.removeprefix(MODEL).partition("@")
    try:
        snapshot_download(name, revision=revision or None, local_files_only=True, cache_dir=folder)
    except (LocalEntryNotFoundError, HFValidationError):
        command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
        remedy = f"run `{command}` on a machine with internet, or give a folder"
        raise UserMistake(f"{name}{f'@{revision}' if revision else ''} is not in the hub cache; {remedy}") from None


def missing(specs: Iterable[str], folder: Path | None = None) -> list[str]:
    """Return why each of these datasets and models cannot be read from the cache `folder` (None: this process's), with
    the command that fetches it; nothing for those that can."""
    reasons = []
    for spec in dict.fromkeys(specs):
        try:
            _find_model(spec, folder) if spec.startswith(MODEL) else dataset_files(spec, folder)
        except UserMistake as mistake:
            reasons.append(str(mistake))
    return reasons
