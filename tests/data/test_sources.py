"""Builtin texts, globs, addresses, and digests of what they hold."""

import contextlib
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as file_systems

from jaxlm.data.config import DataConfig, SourceConfig
from jaxlm.data.formats import FORMATS, LOCAL_FORMATS
from jaxlm.data.optional import MissingPackageError
from jaxlm.data.sources import BUILTIN, files, source_digest
from tests.data import samples
from tests.data.samples import COMPRESS, TEXTS, WRITERS


def read(path, **settings):
    return samples.texts_of(SourceConfig(str(path), **settings))


def test_builtin_austen():
    novels = read("builtin:austen")
    assert [n.split("\n", 1)[0] for n in novels][2] == "PRIDE AND PREJUDICE"
    assert len(novels) == 5
    persuasion = read("builtin:austen_valid"), read("builtin:austen_test")
    assert all(100_000 < len(part[0]) < 300_000 for part in persuasion)
    # Held-out text is not in the training text.
    assert not any(part[0][100_000:100_200] in novel for part in persuasion for novel in novels)


def test_builtin_python():
    modules = read("builtin:python")
    assert len(modules) > 400
    assert Path(contextlib.__file__).read_text(encoding="utf-8") in modules
    assert not any("site-packages" in path for path, _ in files(SourceConfig("builtin:python")))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_has_files(name):
    assert files(SourceConfig(f"builtin:{name}"))


def test_an_unknown_builtin():
    with pytest.raises(ValueError, match=r"source 'builtin:dickens'; allowed: austen, .* python"):
        read("builtin:dickens")


def test_globs(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "x/c.txt", "x/y/d.txt", "z/c.txt", "a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "*/c.txt") == ["x/c.txt", "z/c.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "x/c.txt", "x/y/d.txt", "z/c.txt"]
    assert read(tmp_path / "[a]*") == ["a.md", "a.txt"]
    assert read(tmp_path / "*") == ["a.md", "a.txt", "b.txt"]  # folders are passed over
    monkeypatch.chdir(tmp_path)
    assert read("?.txt") == ["a.txt", "b.txt"]
    (tmp_path / "a[1].txt").write_text("a name, not a pattern")
    assert read("a[1].txt") == ["a name, not a pattern"]


@pytest.mark.parametrize("path", ["no.txt", "no*.txt", "memory://no/a.txt", "memory://no/*.txt"])
def test_a_missing_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        read(path)
    assert str(caught.value).startswith(f"source {path!r}: no such file; allowed: a path, a glob")


@pytest.fixture
def put():
    """Writes a file at an address; the bucket is emptied afterwards."""

    def write(address, data):
        with fsspec.open(address, "wb") as file:
            file.write(data)

    yield write
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Bucket(MemoryFileSystem):
    """Stands where gcsfs would: the same interface, other machines."""

    protocol = ("gs", "memory")


@pytest.fixture(params=["memory", "gs"])
def protocol(request, monkeypatch):
    if request.param == "gs":
        monkeypatch.setitem(file_systems, "gs", Bucket)
    return request.param


@pytest.mark.parametrize("name", [f for f in FORMATS if f not in LOCAL_FORMATS])
def test_addresses(tmp_path, put, protocol, name):
    path = WRITERS[name](tmp_path, TEXTS)
    for file in sorted(tmp_path.iterdir()):
        put(f"{protocol}://bucket/{name}/{file.name}", file.read_bytes())
    assert read(f"{protocol}://bucket/{name}/{path.name}") == TEXTS
    assert read(f"{protocol}://bucket/*/{path.name}") == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_at_an_address(put, suffix):
    put(f"memory://a.jsonl{suffix}", COMPRESS[suffix](samples.jsonl_bytes(TEXTS)))
    assert read(f"memory://a.jsonl{suffix}") == TEXTS


@pytest.mark.parametrize("name", LOCAL_FORMATS)
def test_local_formats_refuse_addresses(put, name):
    put("memory://a", b"x")
    with pytest.raises(ValueError, match=f"format='{name}' at an address; allowed: a local path"):
        read("memory://a", format=name)


def test_a_missing_file_system_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(file_systems, "gs", raising=False)
    with pytest.raises(MissingPackageError, match=r"gs://b/a\.txt: .*gcsfs.*pip install -e"):
        read("gs://b/a.txt")
    with pytest.raises(ValueError, match=r"nosuch://b/a\.txt: .*allowed: a local path, or"):
        read("nosuch://b/a.txt")


def test_digest_is_of_the_contents(tmp_path):
    def digest(name, data, **settings):
        (tmp_path / name).write_bytes(data)
        with tempfile.TemporaryDirectory() as cache:
            return source_digest(SourceConfig(str(tmp_path / name), **settings), Path(cache))

    first = digest("a.jsonl", b'{"text": "a"}')
    assert digest("b.jsonl", b'{"text": "a"}') == first
    assert digest("a.jsonl", b'{"text": "a"}') == first
    others = [
        digest("a.jsonl", b'{"text": "b"}'),
        digest("a.jsonl", b'{"text": "a"}', text_field="b"),
        digest("a.jsonl", b'{"text": "a"}', format="text"),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("where", ["{}", "memory:/{}"])
def test_a_changed_file_is_read_again_and_no_other(tmp_path, put, monkeypatch, where):
    from jaxlm.data import files as module

    opened = []
    real = module.open_binary
    monkeypatch.setattr(module, "open_binary", lambda path: opened.append(path) or real(path))
    paths = [where.format(tmp_path / n) for n in ("a.txt", "b.txt")]
    for path in paths:
        put(path, b"text")
    source = SourceConfig(where.format(tmp_path / "*.txt"))
    before = source_digest(source, tmp_path)
    assert len(opened) == 2
    assert source_digest(source, tmp_path) == before
    assert len(opened) == 2
    put(paths[1], b"test")
    assert source_digest(source, tmp_path) != before
    assert len(opened) == 3


def test_a_datasets_folder_has_a_digest(tmp_path):
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    paths = [
        WRITERS["datasets"](tmp_path / name, texts)
        for name, texts in (("first", TEXTS), ("second", TEXTS[:1]))
    ]
    first, second = (source_digest(SourceConfig(str(p)), tmp_path) for p in paths)
    assert first != second
    paths[0].rename(tmp_path / "third" / "moved")
    moved = SourceConfig(str(tmp_path / "third" / "moved"))
    assert source_digest(moved, tmp_path) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, r"source '': path=''; allowed: a non-empty path"),
        ({"path": 5}, r"data\.sources: path=5; allowed: str"),
        ({"path": "a", "format": "csv"}, r"source 'a': format='csv'; allowed: auto, text, code, "),
        ({"path": "a", "weight": 0.0}, r"source 'a': weight=0\.0; allowed: a finite number > 0"),
        ({"path": "a", "weight": float("nan")}, r"weight=nan; allowed: a finite number > 0"),
        ({"path": "a", "weight": float("inf")}, r"weight=inf; allowed: a finite number > 0"),
        ({"path": "a", "wieght": 1.0}, r"unknown field 'wieght' \(did you mean weight\?\)"),
    ],
)
def test_source_config_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(sources=(settings,))


def test_data_config():
    config = DataConfig(sources=("a.txt,b.txt", "c"), held_out=({"path": "c", "weight": 2},))
    assert config.sources == (SourceConfig("a.txt"), SourceConfig("b.txt"), SourceConfig("c"))
    assert config.held_out == (SourceConfig("c", weight=2),)
    for wrong in (
        {"sources": ()},
        {"sequence_length": 0},
        {"batch_size": 0},
        {"num_threads": -1},
        {"seed": -1},
        {"seed": 2**31},
    ):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"data: {name}=.*; allowed: "):
            DataConfig(**wrong)
    DataConfig(sources=(SourceConfig("a", weight=1e300), SourceConfig("b", weight=1e306)))
    far = r"source 'b': weight=1e\+300; allowed: at most 1000000 times the weight=1e-10 of 'a'"
    with pytest.raises(ValueError, match=far):
        DataConfig(sources=(SourceConfig("a", weight=1e-10), SourceConfig("b", weight=1e300)))
