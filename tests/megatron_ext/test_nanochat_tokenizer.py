"""nanochat's tokenizer.pkl gives the ids that tiktoken gives, and its chats; a stranger's pickle runs nothing."""

import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import regex

from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.packs.materialize import Config
from data_tools.packs.store import Store
from data_tools.tasks.task import Source
from megatron_ext.models.nanochat import tokenizer as nanochat
from tests.data_tools.conftest import build

PATTERN = (  # nanochat/tokenizer.py
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
SPECIAL = ["bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
           "output_start", "output_end"]  # fmt: skip
TEXTS = ["the other theatre", "  there\n\nthen 1234 ", "don't, WON'T!!", "Ärger 世界 ☕\u2028", "a\tb\r\n", ""]


class Encoding:
    """Stands in for tiktoken's, whose state this is."""

    def __init__(self, state: object):
        self.state = state

    def __getstate__(self) -> object:
        return self.state


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setitem(sys.modules, "tiktoken", ModuleType("tiktoken"))
    core = ModuleType("tiktoken.core")
    core.Encoding = Encoding  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiktoken.core", core)
    monkeypatch.setattr(Encoding, "__module__", "tiktoken.core")
    return Encoding


def ranks() -> dict[bytes, int]:
    """Single bytes, and tokens that overlap and can be cut in several ways."""
    found = {bytes([byte]): byte for byte in range(256)}
    tokens = ["th", "he", "the", " t", " the", "er", "re", "ther", "ere", "é", "tre", "at", "eat", "12", "34", "\n\n"]
    for token in [*tokens, "世", " there", "ha", "hat"]:
        found.setdefault(token.encode(), len(found))
    return found


def written(folder: Path, encoding: type, **changes: object) -> Path:
    state: dict[str, object] = {
        "name": "rustbpe",
        "pat_str": PATTERN,
        "mergeable_ranks": ranks(),
        "special_tokens": {f"<|{name}|>": len(ranks()) + place for place, name in enumerate(SPECIAL)},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding({**state, **changes})))
    return folder


def tiktoken_ids(text: str) -> list[int]:
    """Join, in each piece, the leftmost pair whose joint has the lowest rank, as tiktoken does."""
    known, ids = ranks(), []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in known:
            parts = [piece.encode()]
        while joints := [(known[a + b], place) for place, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in known]:
            _, place = min(joints)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [known[part] for part in parts]
    return ids


def test_its_ids_are_those_of_tiktoken_and_its_chats_those_of_nanochat(tmp_path: Path, encoding: type) -> None:
    folder, out = written(tmp_path / "own", encoding), tmp_path / "hf"
    out.mkdir()
    assert nanochat.has_own(folder) and not nanochat.has_own(out)
    nanochat.convert(folder, out)
    assert (out / "tokenizer.pkl").read_bytes() == (folder / "tokenizer.pkl").read_bytes()  # nanochat reads it again
    tokenizer = load_tokenizer(str(out))
    for text in TEXTS:
        assert tokenizer.encode(text) == tiktoken_ids(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    first = len(ranks())
    assert tokenizer.encode("<|bos|>the<|output_end|>") == [first, *tiktoken_ids("the"), first + 8]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (first + 4, first + 9)

    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        '{"messages": [{"role": "system", "content": "Be the one."}, {"role": "user", "content": "There?"}, '
        '{"role": "assistant", "content": "<think>he</think>Here"}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}\n'
    )
    store, _ = build(Config(Source([str(chat)]), str(out)), tmp_path)
    text = "<|bos|><|user_start|>Be the one.\n\nThere?<|user_end|>"
    text += "<|assistant_start|><think>he</think>Here<|assistant_end|>"
    text += "<|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|>"
    ids, mask = Store(store).ids(0), Store(store).mask(0)
    assert tokenizer.decode(ids.tolist()) == text
    trained = tokenizer.decode(ids[mask == 1].tolist())
    assert trained == "<think>he</think>Here<|assistant_end|>b<|assistant_end|>"


@pytest.mark.parametrize("changes, said", [
    ({"pat_str": 3}, "has no pat_str, mergeable_ranks and special_tokens of their types"),
    ({"mergeable_ranks": {b"a": 0}}, "its 1 ranks are not 0 to 0, or lack a byte"),
    ({"special_tokens": {"<|bos|>": 300}}, r"has no special token <\|assistant_end\|>"),
    ({"special_tokens": {"<|bos|>": 999, "<|assistant_end|>": 1000}}, "do not follow its 276 others"),
])  # fmt: skip
def test_what_is_no_tokenizer_of_nanochat_is_refused(tmp_path: Path, encoding: type, changes: dict, said: str) -> None:
    with pytest.raises(UserMistake, match=said):
        nanochat.convert(written(tmp_path, encoding, **changes), tmp_path)


def test_a_pickle_that_names_anything_else_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserMistake, match="tokenizer.pkl: is no tokenizer of nanochat: it names .*open"):
        nanochat.convert(tmp_path, tmp_path)
    assert not (tmp_path / "ran").exists()
