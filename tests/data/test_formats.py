"""Every format gives back the texts that were written; every broken file is named."""

import gzip
import json
import random
import sys
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import formats
from jaxlm.data.config import SourceConfig
from jaxlm.data.formats import FORMATS, split_documents
from jaxlm.data.optional import MissingPackageError
from jaxlm.data.sources import documents
from tests.data import samples
from tests.data.samples import COMPRESS, TEXTS, WRITERS


def read(path, **settings):
    return samples.texts_of(SourceConfig(str(path), **settings))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_reads_what_was_written(tmp_path, name, explicit):
    path = WRITERS[name](tmp_path, TEXTS)
    assert read(path, format=name if explicit else "auto") == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_more_records_than_are_read_at_a_time(tmp_path, name):
    texts = [f"text {i:04d}" for i in range(2 * formats.RECORDS_AT_A_TIME + 5)]
    assert read(WRITERS[name](tmp_path, texts)) == texts


@pytest.mark.parametrize("name", ["jsonl", "parquet", "datasets"])
def test_text_field(tmp_path, name):
    path = WRITERS[name](tmp_path, TEXTS, field="content")
    assert read(path, text_field="content") == TEXTS
    with pytest.raises(ValueError, match=r"a\S*: text_field='text'; allowed: id, content|line 1"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed(tmp_path, suffix):
    """Also of several members or frames, as parallel compressors and `cat` make them."""
    for name, data in (("a.jsonl", samples.jsonl_bytes(TEXTS)), ("a.txt", b"one\n\n\ntwo\n")):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(COMPRESS[suffix](data))
        once = read(path)
        assert once == (TEXTS if name == "a.jsonl" else ["one", "two"])
        path.write_bytes(COMPRESS[suffix](data) + COMPRESS[suffix](b"\n\n\n" + data))
        assert read(path) == once * 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@given(data=st.data())
def test_a_compressed_file_cut_off_anywhere_is_refused(tmp_path_factory, suffix, data):
    texts = [f"text {i * i}" for i in range(300)]
    whole = COMPRESS[suffix](samples.jsonl_bytes(texts))
    path = tmp_path_factory.mktemp("cut") / f"a.jsonl{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}.* is (damaged|not JSON)"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"this is no compressed file at all")
    with pytest.raises(ValueError, match=rf"a\.txt{suffix} is damaged"):
        read(path)
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    data = "".join(f"{i} " for i in range(20_000)).encode()
    whole = bytearray(gzip.compress(data) if suffix == ".gz" else compressor.compress(data))
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=rf"a\.txt{suffix} is damaged"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_memory_is_a_documents_not_the_files(tmp_path, name, suffix):
    digits = random.Random(0).choices("0123456789", k=5_000_000)
    texts = ["".join(digits[i : i + 10_000]) for i in range(0, len(digits), 10_000)]
    data = samples.jsonl_bytes(texts) if name == "a.jsonl" else "\n\n\n".join(texts).encode()
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    size = len(data)
    del texts, data, digits
    tracemalloc.start()
    count = sum(1 for _ in documents(SourceConfig(str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 500
    # The file whole would be 5 MB at least; a document is 10 kB, a block of bytes 64 kB.
    assert peak < size / 8


paragraph = st.text("ab \t", min_size=1, max_size=5).filter(str.strip)
blanks = st.lists(st.sampled_from(["\n", " \n", "\t\n", "\r\n"]), min_size=2, max_size=4)


@given(
    st.lists(st.lists(paragraph, min_size=1, max_size=3), max_size=4),
    st.data(),
)
def test_two_blank_lines_separate_documents(parts, data):
    """By construction: documents of paragraphs, one blank line within, two or more between."""
    wanted = ["\n \n".join(paragraphs) for paragraphs in parts]
    text = "".join(data.draw(blanks)) if data.draw(st.booleans()) else ""
    for document in wanted:
        text += document + "\n" + "".join(data.draw(blanks))
    if data.draw(st.booleans()):
        text = text.rstrip()  # the last line need not end
        wanted[-1:] = [d.rstrip() for d in wanted[-1:]]
    assert list(split_documents(text.splitlines(keepends=True))) == wanted


def test_documents_keep_their_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n\n a\r\n\r\nb \r\n\r\n\r\n\tc\n\n\x0c\n\nd")
    assert read(path) == [" a\r\n\r\nb ", "\tc", "d"]


BROKEN = {
    "empty.txt": (b"", r"empty\.txt is empty"),
    "blank.txt": (b" \n\n\n\n", r"blank\.txt is empty"),
    "binary.txt": (b"abc\n\xff\xfe", r"binary\.txt is not UTF-8 text: byte 4"),
    "nul.txt": (b"abc\nd\0", r"nul\.txt is not text: NUL at byte 5"),
    "binary.py": (b"x = '\xe9'", r"binary\.py is not UTF-8 text: byte 5"),
    "empty.py": (b"\n", r"source '.*empty\.py' is empty"),
    "empty.jsonl": (b"\n\n", r"empty\.jsonl is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), r"empty\.jsonl\.gz is empty"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": ', r"bad\.jsonl, line 3 is not JSON"),
    "deep.jsonl": (b"[" * 200_000, r"deep\.jsonl, line 1 is not JSON"),
    "long.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"long\.jsonl, line 1 is not JSON"),
    "list.jsonl": (b'["a"]\n', r"list\.jsonl, line 1 is list; allowed: a JSON object"),
    "field.jsonl": (b'{"txt": "a", "n": 1}', r"line 1: text_field='text'; allowed: txt, n"),
    "null.jsonl": (b'{"text": null}', r"line 1: text is NoneType; allowed: a string"),
    "half.jsonl": (rb'{"text": "\ud83d"}', r"line 1: text is no text: half a character"),
    "binary.jsonl": (b'{"text": "a"}\n"\xff"', r"binary\.jsonl, line 2 is not UTF-8 text: byte 1"),
    "bad.parquet": (b"PAR1 not really", r"bad\.parquet is no Parquet file"),
    "empty.parquet": (b"", r"empty\.parquet is no Parquet file"),
    "bad.array_record": (b"not really" * 100, r"bad\.array_record (is no Array|is damaged)"),
    "empty.array_record": (b"", r"empty\.array_record (is no Array|is damaged)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_values_that_are_no_text(tmp_path):
    path = WRITERS["parquet"](tmp_path, ["a", None])
    with pytest.raises(ValueError, match=r"parquet, row 1: text is NoneType; allowed: a string"):
        read(path)
    path = WRITERS["datasets"](tmp_path, [1, 2])
    with pytest.raises(ValueError, match=r"row 0: text is int; allowed: a string"):
        read(path)


def test_a_damaged_array_record_is_refused(tmp_path):
    path = WRITERS["array_record"](tmp_path, [f"text {i}" for i in range(1000)])
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.array_record is damaged"):
        read(path)


def test_a_datasets_folder_of_several_splits(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    part = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"several splits; allowed: one of \S+both/train, \S+test"):
        read(tmp_path / "both")
    assert read(tmp_path / "both" / "train") == TEXTS


def test_a_folder_of_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"is no folder of .*allowed: such a folder, or .*/\*\.txt"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a", "datasets")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).mkdir() if package == "datasets" else (tmp_path / name).write_bytes(b"x")
    if package == "datasets":
        (tmp_path / name / "state.json").write_text(json.dumps({}))
    for module in ("zstandard", "pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"{name} needs {package}: pip install -e"):
        read(tmp_path / name)
