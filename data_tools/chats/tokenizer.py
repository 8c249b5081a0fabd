"""The tokenizer of a folder or a hub repository; transformers is imported only where tokenizer.json does not say it
all."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.base import bounds
from data_tools.base.durable import TornFile, read_json
from data_tools.base.inside import expanded, files, inside
from data_tools.chats.unknown import CannotEncode, cannot_encode, check_kept, check_unicode, is_unicode, unknown_of
from data_tools.mistake import Problem, UserMistake

# Classes for which transformers uses tokenizer.json as it stands. For any other it may rebuild the pipeline from the
# class (v5 does for Qwen2), so those go through transformers.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NEVER = "never"  # of a setting `bos`: texts begin as they stand
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """Says what afterok needs of a tokenizer; `backend` is a `tokenizers.Tokenizer` or a transformers one."""

    name: str
    vocab_size: int  # added tokens included
    pad_id: int | None
    eos_id: int | None
    unk_id: int | None
    backend: Any
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, …: what templates may name
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the text alone, no special tokens around it. Raise CannotEncode, which names the
        place in the text, where the tokenizer has none for it."""
        check_unicode(text)
        self._check_kept(text)
        try:
            return _ids(self.backend.encode(text, add_special_tokens=False))
        except Exception as error:  # the library raises bare Exception
            raise cannot_encode(self.name, self._fast, text, error) from None

    @cached_property
    def _check_kept(self) -> Callable[[str], None]:
        """Raise CannotEncode for a text of which a character would be left out in silence."""
        return check_kept(self.name, self._fast)

    @property
    def _fast(self) -> Any:
        """Return the `tokenizers.Tokenizer` that does the work; None where there is none."""
        fast = getattr(self.backend, "backend_tokenizer", self.backend)
        return fast if hasattr(fast, "encode_batch_fast") else None

    @cached_property
    def opening(self) -> list[int]:
        """Return the ids that transformers' tokenizer(text) puts before a text, such as a BOS; what it puts after is no
        part of a text that goes on."""
        for text in ("a", *self._some_tokens):  # a tokenizer of few words may have no "a"
            with contextlib.suppress(CannotEncode):
                plain = self.encode(text)
                whole = _ids(self.backend.encode(text, add_special_tokens=True))
                starts = [n for n in range(len(whole)) if plain and whole[n : n + len(plain)] == plain]
                return whole[: starts[0]] if starts else []
        return []

    @property
    def _some_tokens(self) -> list[str]:
        """Return texts of tokens, the likely words first."""
        return sorted(self.backend.get_vocab(), key=lambda token: (not token.isalnum(), len(token), token))[:64]

    def encode_opened(self, text: str) -> list[int]:
        """Return the ids of a text from its opening on, which a text that has it already gets no second time."""
        ids = self.encode(text)
        return ids if ids[: len(self.opening)] == self.opening else [*self.opening, *ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def fast(self) -> Any:
        """Return the `tokenizers.Tokenizer` that does the work. Raise UserMistake where the tokenizer has none."""
        if self._fast is None:
            remedy = "which loss masks need; convert it"
            raise UserMistake(f"tokenizer {self.name} has no fast form (tokenizer.json), {remedy}")
        return self._fast

    def check_end(self) -> None:
        """Raise UserMistake unless there is an end token. It may be the padding token too, as it is in many a base
        model: a pack's padding is never in the loss, whatever its id."""
        if self.eos_id is None:
            raise UserMistake(f"tokenizer {self.name} has no eos token; name one in its tokenizer_config.json")


def _ids(encoded: Any) -> list[int]:
    return encoded if isinstance(encoded, list) else encoded.ids


def told_opening(tokenizer: Tokenizer, bos: str) -> dict[str, str]:
    """Return the fact `texts_begin`, where the tokenizer has an opening for texts: it, or that it is left out."""
    if not tokenizer.opening:
        return {}
    opening = tokenizer.decode(tokenizer.opening)
    return {"texts_begin": f"without {opening}" if bos == NEVER else f"with {opening}"}


def is_path(name_or_path: str) -> bool:
    """Return whether this names a folder rather than a hub repository (`name` or `owner/name`)."""
    return os.path.isabs(name_or_path) or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Tokenizer:
    """Return the tokenizer of a folder, or of a hub repository in the local cache (compute nodes have no internet).

    Of a model folder, such as the output of import_hf, it is that of its files of Hugging Face.

    A folder whose tokenizer.json transformers would use as it stands is read with the `tokenizers` library alone:
    the same ids without the seconds that importing transformers takes. Raise UserMistake when it is not there.
    """
    folder = _with_files(expanded(name_or_path))
    if folder.is_dir():
        _check_inside(folder)
        _check_no_code(folder)
    if folder.is_dir() and (folder / "tokenizer.json").is_file():
        config = _read_config(folder)
        if config.get("tokenizer_class") in _PLAIN_CLASSES and "added_tokens_decoder" not in config:
            return _load_plain(folder, config)
    elif not folder.is_dir() and is_path(name_or_path):
        raise UserMistake(f"tokenizer {name_or_path}: no such folder; give a folder with a tokenizer or a hub name")
    return _load_with_transformers(str(folder) if folder.is_dir() else name_or_path, revision)


def _with_files(folder: Path) -> Path:
    """Return the folder in which the files of a tokenizer lie: `hf` of a model folder, else the folder itself."""
    return folder / "hf" if (folder / "model.json").is_file() else folder


def _read_config(folder: Path) -> dict[str, Any]:
    return _settings(folder, "tokenizer_config.json")


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of settings; {} where there is none."""
    path = inside(folder, name, needed=False)
    if path is None:
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        raise UserMistake(f"tokenizer {folder}: {name} is not JSON ({error}); write the tokenizer anew") from None
    if not isinstance(found, dict):
        raise UserMistake(f"tokenizer {folder}: {name} is no JSON object; write the tokenizer anew")
    return found


def _check_inside(folder: Path) -> None:
    """Raise UserMistake where a file of the folder leads out of it, or its settings name one elsewhere: transformers
    would follow both."""
    files(folder)
    if (more := folder / "additional_chat_templates").is_dir():
        for path in more.iterdir():
            inside(folder, f"{more.name}/{path.name}")
    for key, value in _read_config(folder).items():
        if key.endswith("_file") and isinstance(value, str) and value:
            path = folder / value  # that of its author's machine as a rule, which is not there
            if path.exists() and not path.resolve().is_relative_to(folder.resolve()):
                said = f"{key} names {value}, which is not in the folder: remove the key"
                raise UserMistake(f"tokenizer {folder}: tokenizer_config.json: {said}")


def _check_no_code(folder: Path) -> None:
    """Raise UserMistake where the tokenizer is Python code in the folder: it is not run."""
    for name in ("tokenizer_config.json", "config.json"):
        classes = _settings(folder, name).get("auto_map") or {}
        named = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
        if named:
            first = next(filter(None, named), named) if isinstance(named, list) else named
            remedy = "convert it to a tokenizer.json and remove the key"
            said = f"auto_map names code of its own, {first}, which is not run"
            raise UserMistake(f"tokenizer {folder}: {name}: {said}; {remedy}")


def _load_plain(folder: Path, config: dict[str, Any]) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(inside(folder, "tokenizer.json")))
    except Exception as error:  # the library raises bare Exception
        raise UserMistake(f"tokenizer {folder}: tokenizer.json is damaged ({error}); write it anew") from None
    _check_ids(folder, backend)
    _check_template(folder, backend)
    backend.no_truncation()  # as transformers does, whatever the file was saved with
    backend.no_padding()

    tokens: dict[str, Any] = {
        key: token.get("content") if isinstance(token, dict) else token
        for key, token in config.items()
        if key in _SPECIAL_TOKENS and token
    }
    if wrong := next((key for key, token in tokens.items() if not is_unicode(token)), ""):
        raise UserMistake(f"tokenizer {folder}: tokenizer_config.json: {wrong} is {config[wrong]!r:.60}, no text")
    pad, eos, unk = (
        backend.token_to_id(tokens[key]) if key in tokens else None for key in ("pad_token", "eos_token", "unk_token")
    )
    return Tokenizer(
        name=str(folder),
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        pad_id=pad,
        eos_id=eos,
        unk_id=unknown_of(backend) if unk is None else unk,
        backend=backend,
        special_tokens=tokens,
        chat_template=_read_template(folder, config),
    )


def _check_ids(folder: Path, backend: Any) -> None:
    """Raise UserMistake where an added token has another id than tokenizer.json says: the library gives it the next one
    that is free, or the vocabulary's, without a word."""
    text = (folder / "tokenizer.json").read_text("utf-8")
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    for token in json.JSONDecoder().raw_decode(text, found.end())[0] if found else ():
        if (own := backend.token_to_id(token["content"])) != token["id"]:
            said = f"the added token {token['content']!r:.60} has id {token['id']} there, and {own} among all tokens"
            raise UserMistake(f"tokenizer {folder}: tokenizer.json: {said}; write it anew")


def _check_template(folder: Path, backend: Any) -> None:
    """Raise UserMistake where what is put around a text leaves the text out, or has it twice: each would be encoded so,
    without a word."""
    processors = [json.loads(backend.post_processor.__getstate__())] if backend.post_processor else []
    while processors:
        processor = processors.pop()
        processors += processor.get("processors", [])
        texts = [piece for piece in processor.get("single", []) if piece.get("Sequence", {}).get("id") == "A"]
        if processor["type"] == "TemplateProcessing" and len(texts) != 1:
            said = (
                f"its post_processor's template `single` has the text (Sequence A) {len(texts)} times instead of once"
            )
            raise UserMistake(f"tokenizer {folder}: tokenizer.json: {said}; write it anew")


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return chat_template.jinja, or the template of the config; of several the one named default, as transformers
    does."""
    file = inside(folder, "chat_template.jinja", needed=False)
    found = read_template(file) if file else config.get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict) and entry.keys() >= {"name", "template"}]
        if len(entries) < len(found):
            said = "chat_template is a list of what is no name and template"
            raise UserMistake(f"tokenizer {folder}: tokenizer_config.json: {said}; mend the list")
        found = next((entry["template"] for entry in reversed(entries) if entry["name"] == "default"), None)
    if not isinstance(found, str | None):
        said = f"chat_template is {found!r:.60}, no text"
        raise UserMistake(f"tokenizer {folder}: tokenizer_config.json: {said}; mend it or remove the key")
    return found


def read_template(path: Path) -> str:
    """Return the text of a file with a chat template. Raise UserMistake for what is none, OSError as open does."""
    try:
        return bounds.read_text(path, bounds.TEMPLATE)
    except UnicodeDecodeError as error:
        said = f"is no text in UTF-8 (byte {error.start:,}: {error.reason}); save it as UTF-8"
        raise UserMistake(Problem(str(path), said)) from None
    except bounds.NoFile as error:
        raise UserMistake(Problem(str(path), f"{error.strerror}; give a file with a chat template")) from None


def has_template(folder: Path) -> bool | None:
    """Return whether the tokenizer in a folder has a chat template, without loading it; None where there is no
    tokenizer, or its files cannot be read, which loading it says."""
    folder = _with_files(folder)
    try:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return None
        return bool(_read_template(folder, _read_config(folder)))
    except (OSError, ValueError, TypeError, KeyError, UserMistake):
        return None


def _load_with_transformers(name: str, revision: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError and ValueError, and whatever it meets in settings of wrong types
        if "trust_remote_code" in str(error):
            remedy = "convert it to a tokenizer.json"
            raise UserMistake(f"tokenizer {name}: is code of its own (auto_map), which is not run; {remedy}") from None
        if Path(name).is_dir():
            raise UserMistake(f"tokenizer {name}: no tokenizer in this folder ({_first_line(error)})") from None
        at = f" at revision {revision}" if revision else ""
        remedy = f"run `hf download {name}` on a machine with internet, or give a folder"
        raise UserMistake(f"tokenizer {name}{at}: no such folder and not in the hub cache; {remedy}") from None
    template, told = backend.chat_template, backend.unk_token_id
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(
        name=name,
        vocab_size=len(backend),
        pad_id=backend.pad_token_id,
        eos_id=backend.eos_token_id,
        unk_id=unknown_of(backend.backend_tokenizer) if told is None and backend.is_fast else told,
        backend=backend,
        special_tokens=backend.special_tokens_map,
        chat_template=template,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Return the end tokens of generation_config.json in a Hugging Face folder, where there is one, and the
    tokenizer's.

    Raises UserMistake for a torn file, and for end tokens that are no ids.
    """
    file = folder / "generation_config.json"
    try:
        named = read_json(file).get("eos_token_id") if file.exists() else None
    except (TornFile, AttributeError) as error:
        message = f"is no generation config ({error}): make the model folder again"
        raise UserMistake(Problem(str(file), message)) from None
    ids = named if isinstance(named, list) else [named]
    if any(token is not None and (type(token) is not int or not 0 <= token < 2**31) for token in ids):
        message = f"eos_token_id is {named!r:.80}, no id of a token and no list of them: correct it"
        raise UserMistake(Problem(str(file), message))
    return {token for token in [*ids, tokenizer.eos_id] if token is not None}
