"""Tokenized, packed documents as memory-mapped arrays: any row at any time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from rich.progress import Progress

from jaxlm.data import sources
from jaxlm.data.config import SourceConfig
from jaxlm.data.packing import Packing, pack, pieces
from jaxlm.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
META = "meta.json"
# Text characters tokenized between two points that a killed build can go on from.
SHARD_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The documents of one source, tokenized with one tokenizer, packed to one row length.

    Attributes:
        tokens: all documents one after the other, each [start token] text [end token].
        packing: rows as runs of `tokens`.
        row_length: tokens a row.
        num_bytes: UTF-8 bytes of the texts.
    """

    tokens: np.ndarray
    packing: Packing
    row_length: int
    num_bytes: int

    def __len__(self) -> int:
        return len(self.packing.offsets) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Row as arrays [row_length]: int32 tokens, targets, positions, segment_ids (1, 2, …; 0 is
        padding) and float32 loss_weights (1 where there is a target).
        """
        out = {
            name: np.zeros(self.row_length, np.int32)
            for name in ("tokens", "targets", "positions", "segment_ids")
        }
        p, at = self.packing, 0
        first, last = int(p.offsets[row]), int(p.offsets[row + 1])
        for segment in range(first, last):
            start, n = int(p.starts[segment]), int(p.lengths[segment])
            run = self.tokens[start : start + n + 1]
            here = slice(at, at + n)
            out["tokens"][here] = run[:-1]
            out["targets"][here] = run[1:]
            out["positions"][here] = np.arange(n)
            out["segment_ids"][here] = segment - first + 1
            at += n
        return out | {"loss_weights": (out["segment_ids"] > 0).astype(np.float32)}

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """A finished store.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its files do not have the sizes it was written with.
        """
        folder = Path(folder)
        meta = json.loads((folder / META).read_text())
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in meta["sizes"]}
        for name, size in meta["sizes"].items():
            if len(arrays[name]) != size:
                raise ValueError(
                    f"{folder}/{name}.npy has {len(arrays[name])} entries; allowed: {size}, as "
                    "written; remove the folder and it is built anew"
                )
        packing = Packing(arrays["offsets"], arrays["starts"], arrays["lengths"])
        return cls(arrays["tokens"], packing, meta["row_length"], meta["num_bytes"])


def file_digest(path: str, known: dict[str, str]) -> str:
    """SHA-256 of a file or folder; `known` spares files unchanged in name, size and time."""
    place = epath.Path(path)
    if "://" not in path and place.is_dir():
        parts = [f for f in sorted(Path(path).rglob("*")) if f.is_file()]
        lines = "".join(f"{f.relative_to(path)} {file_digest(str(f), known)}\n" for f in parts)
        return hashlib.sha256(lines.encode()).hexdigest()
    key = None
    if "://" not in path:
        stat = Path(path).stat()
        key = f"{Path(path).resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key in known:
            return known[key]
    digest = hashlib.sha256()
    with sources._open(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if key is not None:
        known[key] = digest.hexdigest()
    return digest.hexdigest()


def source_digest(source: SourceConfig, cache: Path) -> str:
    """SHA-256 of a source's contents, whatever its files are called."""
    path = cache / "digests.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    before = len(known)
    lines = [f"{kind} {file_digest(p, known)}" for p, kind in sources.files(source)]
    if len(known) > before:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(known))
        temporary.replace(path)
    return hashlib.sha256("\n".join([source.text_field, *lines]).encode()).hexdigest()


def build_store(
    source: SourceConfig, tokenizer: Tokenizer, row_length: int, cache: str | Path
) -> TokenStore:
    """The store of a source, opened if `cache` has it and built if not.

    Its folder is named after the texts', the tokenizer's and the row length's digest: another text
    is another store. A killed build goes on where it was; of two builders the second waits.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    parts = (FORMAT_VERSION, source_digest(source, cache), tokenizer.fingerprint, row_length)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    folder = cache / key
    with _locked(cache / f"{key}.lock"):
        if not (folder / META).exists():
            work = cache / f"{key}.building"
            work.mkdir(exist_ok=True)
            _tokenize(source, tokenizer, work)
            _finish(work, row_length, tokenizer.vocab_size)
            shutil.rmtree(folder, ignore_errors=True)
            work.replace(folder)
    return TokenStore.open(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _shards(source: SourceConfig) -> Iterator[list[str]]:
    """Documents in groups of about SHARD_CHARACTERS."""
    group: list[str] = []
    size = 0
    for text in sources.documents(source):
        group.append(text)
        size += len(text)
        if size >= SHARD_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _tokenize(source: SourceConfig, tokenizer: Tokenizer, work: Path) -> None:
    """One file a shard, written whole or not at all; those that are there are kept."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = False
    with Progress(disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(f"tokenizing {source.path}", total=None)
        for number, texts in enumerate(_shards(source)):
            found = True
            path = work / f"shard_{number:06d}.npz"
            if not path.exists():
                rows = [[*start, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
                temporary = work / "shard.tmp.npz"
                np.savez(
                    temporary,
                    tokens=np.concatenate([np.asarray(r, np.uint32) for r in rows]),
                    lengths=np.array([len(r) for r in rows], np.int64),
                    num_bytes=np.array(sum(len(t.encode()) for t in texts), np.int64),
                )
                temporary.replace(path)
            progress.update(task, advance=len(texts))
    if not found:
        raise ValueError(f"source {source.path!r} has no document; allowed: at least one")


def _finish(work: Path, row_length: int, vocab_size: int) -> None:
    """Joins the shards, packs them, and writes meta.json last."""
    paths = sorted(work.glob("shard_[0-9]*.npz"))
    shards = [np.load(p) for p in paths]
    lengths = np.concatenate([s["lengths"] for s in shards])
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    tokens = np.lib.format.open_memmap(
        work / "tokens.npy", "w+", dtype=dtype, shape=(int(lengths.sum()),)
    )
    at = 0
    for shard in shards:
        part = shard["tokens"]
        tokens[at : at + len(part)] = part
        at += len(part)
    tokens.flush()
    starts = np.cumsum(lengths) - lengths
    packing = pack(*pieces(starts, lengths, row_length), row_length)
    arrays = {"offsets": packing.offsets, "starts": packing.starts, "lengths": packing.lengths}
    for name, array in arrays.items():
        np.save(work / f"{name}.npy", array.astype(np.int64))
    meta = {
        "format": FORMAT_VERSION,
        "row_length": row_length,
        "num_bytes": int(sum(int(s["num_bytes"]) for s in shards)),
        "waste": packing.waste(row_length),
        "sizes": {"tokens": at, **{n: len(a) for n, a in arrays.items()}},
    }
    for path in paths:
        path.unlink()
    temporary = work / "meta.tmp"
    temporary.write_text(json.dumps(meta, indent=1) + "\n")
    temporary.replace(work / META)


def epoch_tokens(stores: Sequence[TokenStore]) -> int:
    """Predictions in one pass over all of them."""
    return int(sum(s.packing.lengths.sum() for s in stores))
