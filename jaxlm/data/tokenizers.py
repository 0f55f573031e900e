"""Text to token ids and back, behind one small protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# Names that end-of-text and start-of-text tokens go by, most telling first.
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
START_TOKENS = ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the library needs of a tokenizer.

    Attributes:
        name: e.g. "bytes" or the file it came from.
        fingerprint: SHA-256 of its contents: data tokenized with another one is another data set.
        vocab_size: ids are below it.
        bos_id: begins every document, if there is one.
        eos_id: ends every document.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no whole character become U+FFFD."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` needs."""
        ...


class Bytes:
    """The 256 bytes of UTF-8, then a start and an end token: 258 ids."""

    name = "bytes"
    fingerprint = hashlib.sha256(b"jaxlm bytes 1").hexdigest()
    vocab_size = 258
    bos_id: int | None = 256
    eos_id = 257

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Start and end tokens are left out."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """One small file."""
        _write_kind(folder, "bytes")


class HuggingFace:
    """A tokenizer.json of the `tokenizers` library.

    Raises:
        ValueError: no end token is known; `eos` names one.
    """

    def __init__(self, path: str | Path, eos: str | None = None):
        import tokenizers

        self._path = Path(path)
        data = self._path.read_bytes()
        self.name = str(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self._inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        stated = self._stated()
        end = self._first([eos, stated.get("eos_token"), *END_TOKENS])
        if end is None:
            special = ", ".join(t.content for t in self._inner.get_added_tokens_decoder().values())
            raise ValueError(
                f"{path}: no end-of-text token among its special tokens ({special}); name it as "
                'eos_token in a tokenizer_config.json beside it: {"eos_token": "…"}'
            )
        self.eos_id = end
        self.bos_id = self._first([stated.get("bos_token"), *START_TOKENS])

    def _stated(self) -> dict[str, Any]:
        """Names of special tokens in tokenizer_config.json, if that is there."""
        path = self._path.with_name("tokenizer_config.json")
        values = json.loads(path.read_text()) if path.exists() else {}
        return {k: v["content"] if isinstance(v, dict) else v for k, v in values.items() if v}

    def _first(self, names: Sequence[str | None]) -> int | None:
        ids = (self._inner.token_to_id(n) for n in names if n is not None)
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids as the file says, without the special tokens it would add."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """The file and its tokenizer_config.json."""
        _write_kind(folder, "huggingface")
        _copy(self._path, Path(folder) / "tokenizer.json")
        config = self._path.with_name("tokenizer_config.json")
        if config.exists():
            _copy(config, Path(folder) / "tokenizer_config.json")


class SentencePiece:
    """A SentencePiece .model file."""

    def __init__(self, path: str | Path):
        import sentencepiece

        self._path, self.name = Path(path), str(path)
        self.fingerprint = hashlib.sha256(self._path.read_bytes()).hexdigest()
        self._inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._inner.get_piece_size()
        if self._inner.eos_id() < 0:
            raise ValueError(f"{path}: the model has no end token; allowed: one with eos_id >= 0")
        self.eos_id = self._inner.eos_id()
        self.bos_id: int | None = self._inner.bos_id() if self._inner.bos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Pieces' ids."""
        return self._inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Start and end tokens are left out."""
        return self._inner.decode([i for i in ids if i not in (self.bos_id, self.eos_id)])

    def save(self, folder: str | Path) -> None:
        """The model file."""
        _write_kind(folder, "sentencepiece")
        _copy(self._path, Path(folder) / "tokenizer.model")


class Tiktoken:
    """A .tiktoken rank file, split by GPT-4's pattern; one end token is added after the ranks."""

    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path: str | Path):
        import base64

        import tiktoken

        self._path, self.name = Path(path), str(path)
        data = self._path.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        pairs = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self.eos_id = max(ranks.values()) + 1
        self.vocab_size = self.eos_id + 1
        self.bos_id: int | None = None
        self._inner = tiktoken.Encoding(
            name=self._path.stem,
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.eos_id},
        )

    def encode(self, text: str) -> list[int]:
        """Ids; what looks like a special token is text."""
        return self._inner.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The end token is left out."""
        return self._inner.decode([i for i in ids if i != self.eos_id])

    def save(self, folder: str | Path) -> None:
        """The rank file."""
        _write_kind(folder, "tiktoken")
        _copy(self._path, Path(folder) / "tokenizer.tiktoken")


KIND = "kind.json"
_SAVED: dict[str, Any] = {
    "bytes": lambda folder: Bytes(),
    "huggingface": lambda folder: HuggingFace(folder / "tokenizer.json"),
    "sentencepiece": lambda folder: SentencePiece(folder / "tokenizer.model"),
    "tiktoken": lambda folder: Tiktoken(folder / "tokenizer.tiktoken"),
}


def _write_kind(folder: str | Path, kind: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / KIND).write_text(json.dumps({"kind": kind}) + "\n")


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: "bytes"; the path of a tokenizer.json, .model (SentencePiece) or .tiktoken file; or a
            folder with a tokenizer.json or one that `save` wrote.

    Raises:
        ValueError: none of these.
        FileNotFoundError: no such file.
    """
    if spec == "bytes":
        return Bytes()
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(
            f"tokenizer={spec!r}: no such file; allowed: bytes, bpe:SIZE, or the path of a "
            "tokenizer.json, .model or .tiktoken file"
        )
    if (path / KIND).is_file():
        return _SAVED[json.loads((path / KIND).read_text())["kind"]](path)
    if path.is_dir():
        path = path / "tokenizer.json"
    kinds: dict[str, Any] = {
        ".json": HuggingFace,
        ".model": SentencePiece,
        ".tiktoken": Tiktoken,
    }
    if path.suffix not in kinds or not path.is_file():
        raise ValueError(f"tokenizer={spec!r}; allowed: a .json, .model or .tiktoken file")
    return kinds[path.suffix](path)
