"""Tokenized, packed documents as memory-mapped arrays: any row at any time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from rich.progress import Progress

from jaxlm.data.chat import ASSISTANT, chat_example, chat_prompt
from jaxlm.data.config import SourceConfig
from jaxlm.data.locks import exclusive
from jaxlm.data.packing import Packing, pack, pack_pairs, pieces
from jaxlm.data.sources import documents, kind_of, line_of, source_digest
from jaxlm.data.tokenizers import Tokenizer

FORMAT_VERSION = 4
META = "meta.json"
# Text characters tokenized between two points that a killed build can go on from.
SHARD_CHARACTERS = 4_000_000
# By a document's number in its shard: in it, errors are told with the document's file and line.
Told = Callable[[int], AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The documents of one source, tokenized with one tokenizer, packed to one row length.

    Attributes:
        tokens: all documents one after the other, each [start token] text [end token].
        packing: rows as runs of `tokens`.
        row_length: tokens a row.
        num_bytes: UTF-8 bytes of the texts.
        bos_id: start token, or None. Every segment begins with it, also one that begins within a
            document: so a model finds the same anchor in training as in what is prompted.
        key: digest of texts, tokenizer and row length.
        learned: of conversations, which tokens are to be predicted; None: all.
        pairs: whether segments 1 and 2 of a row are a chosen and a rejected answer, and so on.
    """

    tokens: np.ndarray
    packing: Packing
    row_length: int
    num_bytes: int
    bos_id: int | None
    key: str
    learned: np.ndarray | None = None
    pairs: bool = False

    def __len__(self) -> int:
        return len(self.packing.offsets) - 1

    @property
    def num_targets(self) -> int:
        """Predicted tokens of all rows."""
        if self.learned is not None:
            return int(self.learned.sum(dtype=np.int64))
        return int(self.packing.lengths.sum(dtype=np.int64))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Row as arrays [row_length]: int32 tokens, targets, positions, segment_ids (1, 2, …; 0 is
        padding) and float32 loss_weights (1 where there is a target).
        """
        out = {
            name: np.zeros(self.row_length, np.int32)
            for name in ("tokens", "targets", "positions", "segment_ids")
        }
        out["loss_weights"] = np.zeros(self.row_length, np.float32)
        p, at = self.packing, 0
        first, last = int(p.offsets[row]), int(p.offsets[row + 1])
        for segment in range(first, last):
            start, n = int(p.starts[segment]), int(p.lengths[segment])
            run = self.tokens[start : start + n + 1]
            here = slice(at, at + n)
            out["tokens"][here] = run[:-1]
            out["targets"][here] = run[1:]
            if self.bos_id is not None:
                out["tokens"][at] = self.bos_id
            out["positions"][here] = np.arange(n)
            out["segment_ids"][here] = segment - first + 1
            learned = self.learned
            out["loss_weights"][here] = 1 if learned is None else learned[start + 1 : start + n + 1]
            at += n
        return out

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """A finished store, wherever it was built or has been moved to.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a file is damaged: it can't be read, or has another size than was written.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / META).read_text())
            lengths, bos_id = dict(meta["sizes"]), meta["bos_id"]
            sizes, pairs = (meta["row_length"], meta["num_bytes"]), meta["pairs"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder / META, error) from error
        arrays = {n: _load(folder / f"{n}.npy", size) for n, size in lengths.items()}
        packing = Packing(arrays["offsets"], arrays["starts"], arrays["lengths"])
        learned = arrays.get("learned")
        return cls(arrays["tokens"], packing, *sizes, bos_id, folder.name, learned, pairs)


def _load(path: Path, size: int) -> np.ndarray:
    """A memory-mapped array of `size` entries, as a plain ndarray (np.memmap slices slowly)."""
    try:
        array = np.asarray(np.load(path, mmap_mode="r"))
        if len(array) != size:
            raise ValueError(f"it has {len(array)} entries; allowed: {size}, as written")
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(path, error) from error
    return array


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); remove its folder and it is built anew")


def build_store(
    source: SourceConfig, tokenizer: Tokenizer, row_length: int, cache: str | Path
) -> TokenStore:
    """The store of a source, opened if `cache` has it and built if not.

    Its folder is named after the texts', the tokenizer's and the row length's digest: another text
    is another store. A killed build goes on where it was; of two builders the second waits.

    Raises:
        ValueError: a source without text, or with a file that can't be read as its format.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    key_parts = (FORMAT_VERSION, source_digest(source, cache), tokenizer.fingerprint, row_length)
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:24]
    folder, shards, packed = cache / key, cache / f"{key}.shards", cache / f"{key}.packed"
    with exclusive(cache / f"{key}.lock"):
        if not (folder / META).exists():
            shards.mkdir(exist_ok=True)
            _tokenize(source, tokenizer, shards)
            shutil.rmtree(packed, ignore_errors=True)
            packed.mkdir()
            _pack(sorted(shards.glob("shard_[0-9]*.npz")), packed, row_length, tokenizer, source)
            shutil.rmtree(folder, ignore_errors=True)
            packed.replace(folder)
        shutil.rmtree(shards, ignore_errors=True)
    store = TokenStore.open(folder)
    if not store.num_targets:
        allowed = "two tokens" if store.learned is None else "one turn of the assistant"
        raise ValueError(
            f"source {source.path!r} has nothing to learn; allowed: at least {allowed}"
        )
    return store


def _shards(source: SourceConfig) -> Iterator[list[str]]:
    """Documents in groups of about SHARD_CHARACTERS."""
    group: list[str] = []
    size = 0
    for text in documents(source):
        group.append(text)
        size += len(text)
        if size >= SHARD_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _tokenize(source: SourceConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """One file a shard, written whole or not at all; those that are there are kept."""
    encode, before = ENCODERS[kind_of(source)], 0
    with Progress(disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(f"tokenizing {source.path}", total=None)
        for number, texts in enumerate(_shards(source)):
            path = folder / f"shard_{number:06d}.npz"
            if not path.exists():
                temporary = folder / "shard.tmp.npz"
                told = functools.partial(_told_with_line, source, before)
                np.savez(temporary, allow_pickle=False, **encode(texts, tokenizer, told))
                temporary.replace(path)
            before += len(texts)
            progress.update(task, advance=len(texts))


@contextlib.contextmanager
def _told_with_line(source: SourceConfig, before: int, number: int) -> Iterator[None]:
    """Errors name the file and line of this document, the one after `before` + `number` others."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{line_of(source, before + number)}: {error}") from error


def _encode_texts(texts: list[str], tokenizer: Tokenizer, told: Told) -> dict[str, np.ndarray]:
    """[start token] text [end token] of each."""
    del told
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows = [[*start, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
    return _joined(rows, sum(len(t.encode()) for t in texts))


def _encode_chats(texts: list[str], tokenizer: Tokenizer, told: Told) -> dict[str, np.ndarray]:
    """Conversations as their template writes them; the bytes are those of the answers."""
    rows, learned, num_bytes = [], [], 0
    for number, text in enumerate(texts):
        talk = json.loads(text)
        with told(number):
            ids, is_learned = chat_example(tokenizer, talk["messages"], tools=talk["tools"])
        rows.append(ids)
        learned.append([False, *is_learned[1:]])  # nothing comes before the first
        said = (m["content"] for m in talk["messages"] if m["role"] == ASSISTANT)
        num_bytes += sum(len(content.encode()) for content in said)
    return _joined(rows, num_bytes) | _flags(learned)


def _encode_preferences(
    texts: list[str], tokenizer: Tokenizer, told: Told
) -> dict[str, np.ndarray]:
    """The chosen, then the rejected answer to each prompt; the bytes are those of the chosen."""
    rows, learned, num_bytes = [], [], 0
    for number, text in enumerate(texts):
        pair = json.loads(text)
        tools = pair["tools"]
        with told(number):
            prompt = len(chat_prompt(tokenizer, pair["prompt"], tools=tools))
            for name in ("chosen", "rejected"):
                talk = pair["prompt"] + pair[name]
                ids, is_learned = chat_example(tokenizer, talk, tools=tools)
                rows.append(ids)
                learned.append([i >= prompt and flag for i, flag in enumerate(is_learned)])
            if rows[-2] == rows[-1]:
                raise ValueError("chosen and rejected are the same; allowed: two that differ")
        num_bytes += sum(len(m["content"].encode()) for m in pair["chosen"])
    return _joined(rows, num_bytes) | _flags(learned)


ENCODERS = {"text": _encode_texts, "chat": _encode_chats, "preference": _encode_preferences}


def _joined(rows: list[list[int]], num_bytes: int) -> dict[str, np.ndarray]:
    return {
        "tokens": np.concatenate([np.asarray(r, np.uint32) for r in rows]),
        "lengths": np.array([len(r) for r in rows], np.int64),
        "num_bytes": np.array(num_bytes, np.int64),
    }


def _flags(learned: list[list[bool]]) -> dict[str, np.ndarray]:
    return {"learned": np.concatenate([np.asarray(row, bool) for row in learned])}


def _pack(
    shards: Sequence[Path],
    folder: Path,
    row_length: int,
    tokenizer: Tokenizer,
    source: SourceConfig,
) -> None:
    """Joins the shards into one array, with the packing of its documents beside it."""
    shard_lengths, num_bytes = [], 0
    for path in shards:
        with np.load(path) as shard:
            shard_lengths.append(shard["lengths"])
            num_bytes += int(shard["num_bytes"])
    document_lengths = np.concatenate(shard_lengths)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    num_tokens = int(document_lengths.sum())
    header = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
    # Written as a file: a full disk is an error then, and would be a crash through a memory map.
    with (folder / "tokens.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for path in shards:
            with np.load(path) as shard:
                file.write(shard["tokens"].astype(dtype).tobytes())
    learned = _learned(shards)
    pairs = kind_of(source) == "preference"
    if pairs:
        packing = pack_pairs(document_lengths, row_length, source.path)
    else:
        packing = pack(*pieces(document_lengths, row_length), row_length)
    arrays = {"offsets": packing.offsets, "starts": packing.starts, "lengths": packing.lengths}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.int64))
    if learned is not None:
        np.save(folder / "learned.npy", learned)
        arrays["learned"] = learned
    meta = {
        "format": FORMAT_VERSION,
        "row_length": row_length,
        "num_bytes": num_bytes,
        "bos_id": tokenizer.bos_id if learned is None else None,  # a template has its own
        "pairs": pairs,
        "waste": packing.waste(row_length),
        "sizes": {"tokens": num_tokens, **{n: len(a) for n, a in arrays.items()}},
    }
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")


def _learned(shards: Sequence[Path]) -> np.ndarray | None:
    """Which of all tokens are to be predicted; None: they are no conversations."""
    parts = []
    for path in shards:
        with np.load(path) as shard:
            if "learned" not in shard:
                return None
            parts.append(shard["learned"])
    return np.concatenate(parts)
