"""The batch of step n: a pure function of (seed, n), read ahead by Grain.

Rows are shuffled and mixed by index, so there is no iterator state to save: a resumed run, a run on
more processes and one on fewer read the same rows at the same step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from jaxlm.config import at_least, check
from jaxlm.data.config import DataConfig, as_source
from jaxlm.data.locks import exclusive
from jaxlm.data.sources import documents, source_digest
from jaxlm.data.stall import patience
from jaxlm.data.store import TokenStore, build_store
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.data.train_bpe import train_bpe

Batch = dict[str, np.ndarray]


def _stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Grain's view of a run: element n is this process's part of step n's batch.

    Attributes:
        stores: rows are numbered from the first row of the first store to the last of the last.
        order: row numbers in the order of the run. (Numbers, because Grain measures every element
            that it passes on: whole rows cost it three times as much as reading them.)
        batch_size: of all processes.
        rows: of a batch, that this process reads.
    """

    stores: tuple[TokenStore, ...]
    order: grain.MapDataset
    batch_size: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return 2**40  # a run may go on for ever

    def __getitem__(self, step: int) -> Batch:
        first = int(step) * self.batch_size
        return _stack([self._row(self.order[first + row]) for row in self.rows])

    def _row(self, number: int) -> Batch:
        for store in self.stores:
            if number < len(store):
                return store[number]
            number -= len(store)
        raise IndexError(number)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of a run, and its held-out text.

    Attributes:
        config: the data's config.
        stores: one for each training source.
        held_out_stores: one for each held-out source.
        rows: of every batch, that this process reads; None: all.
    """

    config: DataConfig
    stores: tuple[TokenStore, ...]
    held_out_stores: tuple[TokenStore, ...] = ()
    rows: tuple[int, ...] | None = None

    def _steps(self) -> _Steps:
        seeds = np.random.SeedSequence(self.config.seed).generate_state(len(self.stores))
        orders, first = [], 0
        for store, seed in zip(self.stores, seeds, strict=True):
            numbers = grain.MapDataset.range(first, first + len(store))
            orders.append(numbers.shuffle(seed=int(seed)).repeat())
            first += len(store)
        order = orders[0]
        if len(orders) > 1:
            # Grain scales the smallest to 100 and cuts the rest to whole numbers: round them first.
            smallest = min(s.weight for s in self.config.sources)
            weights = [round(100 * s.weight / smallest) for s in self.config.sources]
            order = grain.MapDataset.mix(orders, weights=weights)
        rows = range(self.config.batch_size) if self.rows is None else self.rows
        return _Steps(self.stores, order, self.config.batch_size, rows)

    def batch_at(self, step: int) -> Batch:
        """This process's rows of step `step`, arrays [rows, sequence_length]."""
        return self._steps()[step]

    def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
        """Batches of steps start, start + 1, …, assembled ahead on threads that end with it."""
        options = grain.ReadOptions(
            num_threads=self.config.num_threads, prefetch_buffer_size=2 * self.config.num_threads
        )
        steps = grain.MapDataset.source(self._steps())[start:]
        with contextlib.closing(iter(steps.to_iter_dataset(options))) as batches:
            yield from batches

    def held_out(self) -> Iterator[Batch]:
        """The held-out text once, in order."""
        for store in self.held_out_stores:
            yield from in_order(store, self.config.batch_size)

    @property
    def contents(self) -> dict[str, str]:
        """Digest of each source's texts, tokens and rows: what a run must find again to go on."""
        named = [
            *zip(self.config.sources, self.stores, strict=True),
            *zip(self.config.held_out, self.held_out_stores, strict=True),
        ]
        return {source.path: store.key for source, store in named}

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of text for each predicted token, in the mixture that training reads."""
        rows = [
            s.weight / len(store) for s, store in zip(self.config.sources, self.stores, strict=True)
        ]
        num_bytes = sum(r * store.num_bytes for r, store in zip(rows, self.stores, strict=True))
        targets = sum(r * store.num_targets for r, store in zip(rows, self.stores, strict=True))
        return num_bytes / targets

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return sum(store.num_bytes for store in self.held_out_stores)


def in_order(store: TokenStore, batch_size: int) -> Iterator[Batch]:
    """Every row once; the last batch is filled up with rows of weight 0, so shapes never change."""
    for first in range(0, len(store), batch_size):
        rows = [store[i] for i in range(first, min(first + batch_size, len(store)))]
        empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
        yield _stack(rows + [empty] * (batch_size - len(rows)))


def open_tokenizer(config: DataConfig, cache: Path) -> Tokenizer:
    """The config's tokenizer; "bpe:SIZE" is trained on the sources, once for each content."""
    name, _, size = config.tokenizer.partition(":")
    if name != "bpe":
        return load_tokenizer(config.tokenizer)
    if not size.isdecimal():
        raise ValueError(f"tokenizer={config.tokenizer!r}; allowed: bpe:SIZE, as in bpe:4096")
    cache.mkdir(parents=True, exist_ok=True)
    digests = " ".join(source_digest(s, cache) for s in config.sources)
    folder = cache / f"bpe_{size}_{hashlib.sha256(digests.encode()).hexdigest()[:24]}"
    with exclusive(f"{folder}.lock"):
        path = folder / "tokenizer.json"
        if not path.exists():
            train_bpe((t for s in config.sources for t in documents(s)), int(size), path)
    return load_tokenizer(str(path))


def open_loader(
    config: DataConfig, cache: str | Path, tokenizer: Tokenizer | None = None
) -> tuple[Loader, Tokenizer]:
    """Tokenizer (the config's, unless one is given) and token stores of a run, from `cache` or
    built into it.
    """
    cache = Path(cache)
    with patience(config.stall_seconds):
        ours = tokenizer or open_tokenizer(config, cache)
        stores, held_out_stores = (
            tuple(build_store(s, ours, config.sequence_length, cache) for s in sources)
            for sources in (config.sources, config.held_out)
        )
    return Loader(config, stores, held_out_stores), ours


def held_out_batches(
    source: str, tokenizer: Tokenizer, length: int, batch_size: int, cache: str | Path
) -> tuple[Iterator[Batch], int]:
    """(batches of a text in order, its UTF-8 bytes), packed to rows of `length` tokens."""
    check("held_out_batches", length=at_least(length, 1), batch_size=at_least(batch_size, 1))
    store = build_store(as_source(source), tokenizer, length, cache)
    return in_order(store, batch_size), store.num_bytes
