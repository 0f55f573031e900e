"""Step n's batch: the same on every machine, at every start, in any number of processes."""

import dataclasses
import errno
import gc
import hashlib
import itertools
import os
import threading
import time

import numpy as np
import pytest

from jaxlm.data.config import DataConfig, SourceConfig
from jaxlm.data.loader import held_out_batches, in_order, open_loader
from jaxlm.data.store import TokenStore, build_store
from jaxlm.data.tokenizers import Bytes
from tests.data import samples

WEIGHTS = (0.5, 0.2, 0.3)
LENGTH = 32


def synthetic(number: int) -> list[str]:
    """Documents of many lengths, made without any library."""
    state, texts = number + 1, []
    for i in range(25 + 10 * number):
        state = state * 48271 % (2**31 - 1)
        letters = (chr(97 + (state * (j + 1) >> 5) % 26) for j in range(state % 90))
        texts.append(f"{number}.{i} {''.join(letters)}")
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(samples.jsonl_bytes(synthetic(i)))
    return folder


@pytest.fixture(scope="module")
def make(corpus):
    def make(rows=None, weights=WEIGHTS, **settings):
        sources = tuple(
            SourceConfig(str(corpus / f"{i}.jsonl"), weight=w) for i, w in enumerate(weights)
        )
        config = DataConfig(
            **{
                "sources": sources,
                "held_out": (str(corpus / "0.jsonl"),),
                "sequence_length": LENGTH,
                "batch_size": 8,
                **settings,
            }
        )
        loader, tokenizer = open_loader(config, corpus / "cache")
        assert isinstance(tokenizer, Bytes)
        return dataclasses.replace(loader, rows=rows)

    return make


def prefetching():
    return [t.name for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


@pytest.fixture(autouse=True)
def no_threads_are_left():
    """Dropped iterators take their threads along; a batch that is under way may end."""
    yield
    until = time.monotonic() + 10
    while prefetching() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert not prefetching()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


def digest(batches) -> str:
    sha = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            sha.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
            sha.update(batch[name].tobytes())
    return sha.hexdigest()


# Shuffle, packing, mixture and row layout of a fixed text. If one of these changes, a run that is
# resumed reads other text than it would have: change it knowingly, and say so to its users.
FROZEN = {
    0: "18648c3d31b492b1199a3c4692c3d072ccfb56be55849fa05d1af127d30aefab",
    7: "7aa84740e571954ea5705d8343d0564b8edbb4d3cc89e8f3f1a4f849d587eef1",
    2**31 - 1: "fd22b233b623b62467322d5e42ae5e5ce18fe83d32a1d6c69c2a0f851d96db1e",
}


@pytest.mark.parametrize("seed", FROZEN)
def test_order_is_frozen(make, seed):
    loader = make(seed=seed)
    steps = [*range(6), 1000, 10**6]  # within the first epoch and far beyond
    assert digest(loader.batch_at(step) for step in steps) == FROZEN[seed]


def test_batches_are_a_function_of_seed_and_step(make):
    loader = make()
    later, earlier = loader.batch_at(30), loader.batch_at(3)
    again = make()
    assert_same(again.batch_at(3), earlier)
    assert_same(again.batch_at(30), later)
    assert digest([earlier]) != digest([later])
    assert digest([make(seed=1).batch_at(3)]) != digest([earlier])


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 7, 1000])
def test_iterate_gives_batch_at(make, num_threads, start):
    loader = make(num_threads=num_threads)
    for step, batch in enumerate(itertools.islice(loader.iterate(start), 20), start):
        assert_same(batch, loader.batch_at(step))


@pytest.mark.parametrize("parts", [[range(8)], [range(4), range(4, 8)], [(0, 3), (1,), (7, 2)]])
def test_parts_of_processes_are_the_whole_batch(make, parts):
    whole = make()
    for rows in parts:
        part = make(tuple(rows))
        for step in (0, 5, 77):
            want = {n: x[list(rows)] for n, x in whole.batch_at(step).items()}
            assert_same(part.batch_at(step), want)


def test_hosts_may_come_and_go(make):
    """A run of two hosts that goes on with four, and then with one, reads the frozen batches."""
    batches = []
    for hosts, steps in ((2, range(3)), (4, range(3, 6)), (1, (1000, 10**6))):
        size = 8 // hosts
        loaders = [make(tuple(range(h * size, (h + 1) * size)), seed=7) for h in range(hosts)]
        for step in steps:
            parts = [loader.batch_at(step) for loader in loaders]
            batches.append({n: np.concatenate([part[n] for part in parts]) for n in parts[0]})
    assert digest(batches) == FROZEN[7]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_on_a_thread_ends_the_run_with_its_cause(make, monkeypatch, num_threads):
    """A disk that is lost, say: what was read before it comes, and then the error; no hang."""
    loader = make(num_threads=num_threads)
    lost = loader.batch_at(9)["tokens"][0].tobytes()
    read = TokenStore.__getitem__

    def fails(store, row):
        found = read(store, row)
        if found["tokens"].tobytes() == lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "tokens.npy")
        return found

    monkeypatch.setattr(TokenStore, "__getitem__", fails)
    batches = loader.iterate(7)
    assert_same(next(batches), loader.batch_at(7))
    assert_same(next(batches), loader.batch_at(8))
    with pytest.raises(OSError, match=r"Input/output error: 'tokens\.npy'"):
        next(batches)


def drawn(loader, num_rows):
    """(source, row) of the first rows of a run, recognized by their tokens."""
    known = {
        store[row]["tokens"].tobytes(): (source, row)
        for source, store in enumerate(loader.stores)
        for row in range(len(store))
    }
    assert len(known) == sum(len(store) for store in loader.stores)
    batches = itertools.islice(loader.iterate(), -(-num_rows // loader.config.batch_size))
    return [known[row.tobytes()] for batch in batches for row in batch["tokens"]][:num_rows]


@pytest.mark.parametrize("weights", [(1.0,), (2, 1), (1.0, 1.009), (0.5, 0.2, 0.3), (97, 1, 2)])
def test_mixture(make, weights):
    """After n rows a source has had its share of n; at every n.

    Sources take their rows one after the other, each from what those before it have left, and each
    rounds to whole rows: that is less than a row a source, and k sources are off by less than k.
    """
    loader = make(weights=weights)
    sources = np.array([source for source, _ in drawn(loader, 800)])
    ns = np.arange(1, 801)
    rounded = np.round(100 * np.array(weights) / min(weights))
    shares = rounded / rounded.sum()
    for source, share in enumerate(shares):
        had = np.cumsum(sources == source)
        assert np.abs(had - share * ns).max() < len(weights)


def test_an_epoch_of_a_source_is_a_permutation(make):
    loader = make()
    rows = drawn(loader, 800)
    for source, store in enumerate(loader.stores):
        of_source = [row for s, row in rows if s == source]
        epochs = [of_source[i : i + len(store)] for i in range(0, len(of_source), len(store))]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(len(store))) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        # Each epoch has an order of its own, and none is that of the store.
        assert len({tuple(e) for e in [*epochs[:-1], list(range(len(store)))]}) == len(epochs)


def test_another_seed_is_another_order(make):
    assert drawn(make(), 100) != drawn(make(seed=1), 100)


def test_held_out_text_comes_once(make):
    loader = make(held_out=tuple(s.path for s in make().config.sources[:2]))
    batches = list(loader.held_out())
    assert {b["tokens"].shape for b in batches} == {(8, LENGTH)}
    texts = [t for i in range(2) for t in synthetic(i)]
    assert loader.held_out_bytes == sum(len(t.encode()) for t in texts)
    # As many targets of each kind as the texts have bytes, and an end for each.
    targets = np.concatenate([b["targets"][b["loss_weights"] > 0] for b in batches])
    wanted = np.concatenate([[*t.encode(), Bytes.eos_id] for t in texts])
    np.testing.assert_array_equal(np.sort(targets), np.sort(wanted))
    assert sum(b["loss_weights"].sum() for b in batches) == len(wanted)


def test_held_out_batches_of_a_source(corpus):
    path = str(corpus / "1.jsonl")
    batches, num_bytes = held_out_batches(path, Bytes(), 16, 4, corpus / "cache")
    store = build_store(SourceConfig(path), Bytes(), 16, corpus / "cache")
    assert num_bytes == store.num_bytes
    for one, other in zip(batches, in_order(store, 4), strict=True):
        assert_same(one, other)


def test_a_batch_of_more_rows_than_there_are(make):
    """Small sources repeat within a batch; the held-out text does not."""
    loader = make(batch_size=512, weights=(1.0,))
    assert len(loader.stores[0]) < 512
    assert loader.batch_at(0)["tokens"].shape == (512, LENGTH)
    (held_out,) = loader.held_out()
    assert held_out["tokens"].shape == (512, LENGTH)
    assert held_out["loss_weights"].sum() == loader.held_out_stores[0].packing.lengths.sum()


def test_no_held_out_text(make):
    loader = make(held_out=())
    assert list(loader.held_out()) == []
    assert loader.held_out_bytes == 0


def test_threads_end_with_their_iterator(make):
    loader = make(num_threads=2)
    kept = loader.iterate()
    next(kept)
    for _ in range(10):
        next(loader.iterate())
    assert prefetching()
    kept.close()
    assert_same(next(loader.iterate(4)), loader.batch_at(4))
