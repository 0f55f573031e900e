"""What a store holds, what it is called, and what becomes of it when things go wrong."""

import contextlib
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import store
from jaxlm.data.config import SourceConfig
from jaxlm.data.store import META, TokenStore, build_store
from jaxlm.data.tokenizers import Bytes, load_tokenizer
from tests.data import building_process, samples
from tests.data.building_process import NUM_SHARDS, ROW_LENGTH

ARRAYS = ("tokens", "offsets", "starts", "lengths")


def write_documents(path, texts):
    path.write_bytes(samples.jsonl_bytes(texts))
    return SourceConfig(str(path))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def store_folder(cache: Path) -> Path:
    (folder,) = [p for p in cache.iterdir() if p.is_dir() and not p.name.startswith("bpe_")]
    return folder


def assert_same_rows(one, other):
    assert len(one) == len(other)
    for i in range(len(one)):
        a, b = one[i], other[i]
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def segments(row):
    """(tokens, targets, positions) of each segment of a row, one number after the other."""
    found = {}
    columns = (row[n].tolist() for n in ("segment_ids", "tokens", "targets", "positions"))
    for segment, token, target, position in zip(*columns, strict=True):
        if segment:
            found.setdefault(segment, []).append((token, target, position))
    return found


@given(
    texts=st.lists(st.text(max_size=40).filter(str.strip), min_size=1, max_size=12),
    row_length=st.integers(1, 24),
)
def test_rows_hold_every_prediction_once(tmp_path_factory, texts, row_length):
    """Oracle: the pairs (token, next token) of every document, cut by hand."""
    folder = tmp_path_factory.mktemp("store")
    tokenizer = Bytes()
    built = build_store(write_documents(folder / "a.jsonl", texts), tokenizer, row_length, folder)
    wanted = Counter()
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for first in range(0, len(ids) - 1, row_length):
            piece = ids[first : first + row_length + 1]
            piece[0] = tokenizer.bos_id  # the last target of the piece before, or the start itself
            wanted[tuple(zip(piece[:-1], piece[1:], range(row_length), strict=False))] += 1
    found = Counter()
    for i in range(len(built)):
        row = built[i]
        assert {n: (v.shape, v.dtype) for n, v in row.items()} == {
            "tokens": ((row_length,), np.int32),
            "targets": ((row_length,), np.int32),
            "positions": ((row_length,), np.int32),
            "segment_ids": ((row_length,), np.int32),
            "loss_weights": ((row_length,), np.float32),
        }
        parts = segments(row)
        found.update(tuple(part) for part in parts.values())
        # Segments are numbered from 1 without gaps; padding is at the end, weightless and zero.
        used = sum(len(part) for part in parts.values())
        assert list(parts) == list(range(1, len(parts) + 1))
        assert np.all(np.diff(row["segment_ids"][:used]) >= 0)
        np.testing.assert_array_equal(row["loss_weights"], np.arange(row_length) < used)
        assert not any(row[n][used:].any() for n in row)
    assert found == wanted
    assert built.num_bytes == sum(len(t.encode()) for t in texts)


def test_wide_vocabularies_are_not_cut(tmp_path):
    """Ids above 2**16 need more than two bytes."""

    class Wide(Bytes):
        vocab_size = 100_258
        fingerprint = "wide"

        def encode(self, text):
            return [100_000 + i for i in super().encode(text)]

    source = write_documents(tmp_path / "a.jsonl", ["abc"])
    assert build_store(source, Wide(), 8, tmp_path)[0]["tokens"].max() == 100_000 + ord("c")


def test_waste_on_a_real_text(tmp_path):
    text = SourceConfig("builtin:austen_valid")
    whole = build_store(text, Bytes(), 512, tmp_path)
    assert whole.packing.waste(512) < 0.02


def test_another_content_tokenizer_or_length_is_another_store(tmp_path):
    cache = tmp_path / "cache"

    def name(texts, tokenizer="bytes", row_length=16, file="a.jsonl"):
        source = write_documents(tmp_path / file, texts)
        before = set(cache.glob("*")) if cache.exists() else set()
        build_store(source, load_tokenizer(tokenizer), row_length, cache)
        return {p.name for p in set(cache.glob("*")) - before if p.is_dir()}

    assert len(name(["some text"])) == 1
    assert len(name(["some test"])) == 1
    assert len(name(["some text"], row_length=17)) == 1
    assert len(name(["some text"], tokenizer=samples.make_tiktoken(tmp_path))) == 1
    # The same again is the store that is there, whatever the file is called.
    assert name(["some text"]) == set()
    assert name(["some text"], file="b.jsonl") == set()


def test_a_store_can_be_moved(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", samples.TEXTS)
    built = build_store(source, Bytes(), 16, tmp_path / "cache")
    before = [built[i] for i in range(len(built))]
    shutil.move(store_folder(tmp_path / "cache"), tmp_path / "elsewhere")
    assert_same_rows(TokenStore.open(tmp_path / "elsewhere"), before)


def test_nothing_but_the_store_is_left(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", samples.TEXTS)
    build_store(source, Bytes(), 16, tmp_path / "cache")
    folder = store_folder(tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == sorted([META, *(f"{n}.npy" for n in ARRAYS)])


def spoil(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "deleted":
        path.unlink()
    elif how == "garbled":
        path.write_bytes(b"\xff" * len(data))
    elif how == "shorter":
        np.save(path, np.load(path)[:-1])
    elif how == "pickled":
        np.save(path, np.asarray([Harm(path.with_name(HARM))]), allow_pickle=True)


HARM = "harm"


class Harm:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_harm_is_done_by_whoever_unpickles(tmp_path):
    (tmp_path / "a.npy").touch()
    spoil(tmp_path / "a.npy", "pickled")
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / HARM).exists()


@pytest.mark.parametrize("how", ["cut", "emptied", "deleted", "garbled", "shorter", "pickled"])
@pytest.mark.parametrize("name", ARRAYS)
def test_a_damaged_array_is_refused(tmp_path, name, how):
    source = write_documents(tmp_path / "a.jsonl", samples.TEXTS)
    build_store(source, Bytes(), 16, tmp_path / "cache")
    spoil(store_folder(tmp_path / "cache") / f"{name}.npy", how)
    message = rf"{name}\.npy is damaged \(.*\); remove its folder and it is built anew"
    with pytest.raises(ValueError, match=message):
        build_store(source, Bytes(), 16, tmp_path / "cache")
    assert not (store_folder(tmp_path / "cache") / HARM).exists()
    shutil.rmtree(store_folder(tmp_path / "cache"))
    build_store(source, Bytes(), 16, tmp_path / "cache")


def test_damaged_metadata_is_refused(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", samples.TEXTS)
    build_store(source, Bytes(), 16, tmp_path / "cache")
    for how in ("cut", "emptied", "garbled", "of another kind"):
        meta = store_folder(tmp_path / "cache") / META
        good = meta.read_bytes()
        meta.write_bytes(good[:-3]) if how == "cut" else spoil(meta, how)
        if how == "of another kind":
            meta.write_text('{"sizes": []}')
        with pytest.raises(ValueError, match=r"meta\.json is damaged"):
            build_store(source, Bytes(), 16, tmp_path / "cache")
        meta.write_bytes(good)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TokenStore.open(tmp_path / "nowhere")


def test_a_file_that_ends_in_an_error_leaves_no_store(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(samples.jsonl_bytes(samples.TEXTS) + b"{")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4 is not JSON"):
        build_store(SourceConfig(str(path)), Bytes(), 16, tmp_path / "cache")
    source = write_documents(path, samples.TEXTS)
    built = build_store(source, Bytes(), 16, tmp_path / "cache")
    again = build_store(write_documents(tmp_path / "b.jsonl", samples.TEXTS), Bytes(), 16, tmp_path)
    assert_same_rows(built, again)


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow past it: the kernel refuses the write as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# 100,000 tokens are 200 kB in the store, and 400 kB in one shard or 80 kB in each of five.
@pytest.mark.parametrize("shard_characters", [4_000_000, 20_000])
def test_no_room_on_the_disk(tmp_path, monkeypatch, shard_characters):
    monkeypatch.setattr(store, "SHARD_CHARACTERS", shard_characters)
    texts = [f"{i}" * 20_000 for i in range(5)]
    source = write_documents(tmp_path / "a.jsonl", texts)
    with file_size_limit(150_000), pytest.raises(OSError, match="File too large"):
        build_store(source, Bytes(), 64, tmp_path / "cache")
    assert len(shard_names(tmp_path / "cache")) == (5 if shard_characters == 20_000 else 0)
    built = build_store(source, Bytes(), 64, tmp_path / "cache")
    assert_same_rows(built, build_store(source, Bytes(), 64, tmp_path / "fresh"))


def start(path, cache, seconds):
    command = [sys.executable, "-m", "tests.data.building_process", path, cache, str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def go(process):
    """Imports are done, the build begins."""
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def shard_names(cache):
    return {p.name for p in cache.glob("*.shards/shard_[0-9]*.npz")}


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path, kills):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    building_process.write_texts(path)
    generator = random.Random(0)
    for _ in range(kills):
        before = shard_names(cache)
        with start(path, cache, 0.02) as process:
            go(process)
            enough = len(before) + generator.randint(1, max(NUM_SHARDS // kills // 2, 1))
            while len(shard_names(cache)) < enough and process.poll() is None:
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.02))
            process.kill()
        assert process.returncode == -9
        assert shard_names(cache) > before  # it got on, and kept what was there
    kept = {p: p.stat().st_mtime_ns for p in cache.glob("*.shards/shard_[0-9]*.npz")}
    assert 0 < len(kept) < NUM_SHARDS
    built = building_process.build(str(path), str(cache), 0.0)
    fresh = building_process.build(str(path), str(tmp_path / "fresh"), 0.0)
    assert contents(store_folder(cache)) == contents(store_folder(tmp_path / "fresh"))
    assert_same_rows(built, fresh)


def test_shards_that_are_there_are_not_tokenized_again(tmp_path, monkeypatch):
    """Stopped at the worst moment: all is tokenized, nothing is packed."""
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    building_process.write_texts(path)

    def stop(*args):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(store, "_pack", stop)
        building_process.build(str(path), str(cache), 0.0)
    count = len(shard_names(cache))
    assert count > 10
    with monkeypatch.context() as patch:
        patch.setattr(building_process.Slow, "encode", stop)
        built = building_process.build(str(path), str(cache), 0.0)
    assert len(built)
    assert not shard_names(cache)


def test_two_builders_at_once_give_one_store(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    building_process.write_texts(path)
    both = [start(path, cache, 0.01) for _ in range(2)]
    for process in both:
        go(process)
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "built\n")
    fresh = building_process.build(str(path), str(tmp_path / "fresh"), 0.0)
    assert contents(store_folder(cache)) == contents(store_folder(tmp_path / "fresh"))
    assert len(fresh) and fresh.row_length == ROW_LENGTH
