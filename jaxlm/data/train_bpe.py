"""Train a byte-level BPE on the texts of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

BOS, EOS = "<|bos|>", "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Writes a tokenizer.json whose ids cover every byte, so that no text is out of vocabulary.

    Deterministic: the same texts give the same bytes. Numbers are cut into single digits, which
    arithmetic is easier on.

    Args:
        texts: documents.
        vocab_size: of all ids, the 256 bytes and two special tokens included; a short text gives
            fewer.
        path: of the tokenizer.json.

    Raises:
        ValueError: vocab_size below 258.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}; allowed: >= 258, the bytes and two specials")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Paragraphs, not books: the trainer counts words, and one huge text is one huge work item.
    paragraphs = (part for text in texts for part in text.split("\n\n") if part)
    bpe.train_from_iterator(paragraphs, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_suffix(".tmp")
    bpe.save(str(temporary))
    temporary.replace(path)
