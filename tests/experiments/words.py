"""A tokenizer of whole words, for languages that an experiment makes up."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

END = "<end>"


class Words:
    """The words that it is given, in this order, then an end token; a text is words with nothing
    between them, of which the longest that fits comes next; what is no word is left out.
    """

    name = "words"
    bos_id: int | None = None

    def __init__(self, words: Sequence[str]):
        self.words = [*words, END]
        self.ids = {word: i for i, word in enumerate(self.words)}
        assert len(self.ids) == len(self.words), "a word stands twice in the list"
        longest_first = sorted(words, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.fingerprint = hashlib.sha256(json.dumps(self.words).encode()).hexdigest()
        self.vocab_size = len(self.words)
        self.eos_id = self.ids[END]
        self.stop_ids: tuple[int, ...] = (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in self.pattern.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids if i < self.eos_id)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / "words.json").write_text(json.dumps(self.words), encoding="utf-8")
