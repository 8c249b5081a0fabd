"""A character-level tokenizer in Hugging Face format: one id per character of an alphabet.

    <pad> 0   <eos> 1   <unk> 2   then the alphabet in order

Every character outside the alphabet becomes <unk>, so that a caller can tell. `transformers.AutoTokenizer` loads the
folder; decoding joins the characters without spaces, an exact round trip. The chat template writes the messages one
after the other, with an end token behind an assistant's: a chat of a prompt and its completion has the ids of a task's
row, so that what reject_filter keeps of a task's samples is trained as it was sampled.
"""

from pathlib import Path

from data_tools.base.durable import read_json, write_file, write_json
from data_tools.mistake import UserMistake

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
_MOST_BYTES = 1 << 22  # of a tokenizer.json that may be one of these
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def write_char_tokenizer(folder: Path, alphabet: str, chat_template: str = "") -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; the same arguments give the same bytes.

    Raise UserMistake when a character of the alphabet occurs twice.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    twice = sorted({character for character in alphabet if alphabet.count(character) > 1})
    if twice:
        raise UserMistake(f"alphabet {alphabet!r} holds {''.join(twice)!r} more than once; name each character once")
    special = [PAD, EOS, UNK]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,  # no limit of its own; transformers warns without a number
        **({"chat_template": chat_template} if chat_template else {}),
    }
    write_json(folder / "tokenizer_config.json", config)


def characters_of(folder: Path) -> str | None:
    """Return every character that the tokenizer of a folder knows; None where it is not one of these, or not there."""
    file = folder / "tokenizer.json"
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return None
        model = read_json(file)["model"]
        vocabulary = model["vocab"] if model["type"] == "WordLevel" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = [token for token in vocabulary if token not in (PAD, EOS, UNK)]
    return "".join(known) if known and all(len(token) == 1 for token in known) else None
