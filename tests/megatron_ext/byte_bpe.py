"""A small byte-level BPE, as GGUF can have it, with special tokens of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def byte_bpe(
    folder: Path, texts: Sequence[str], specials: Sequence[str], *, eos: str, pad: str, vocabulary: int = 400
) -> Any:
    """Train one on `texts`, save it in `folder`, and return it; its words are GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)
    return fast
