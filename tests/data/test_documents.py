"""Windows for loss far beyond the training length."""

import numpy as np
import pytest

from jaxlm.data.documents import long_windows, longest_window
from jaxlm.data.tokenizers import Bytes, load_tokenizer
from tests.data import samples


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(1000)) + "\n\n\nsecond document")
    return str(path)


TEXT = "".join(chr(33 + i % 90) for i in range(1000)) + "\n\nsecond document"


@pytest.mark.parametrize(("length", "count"), [(100, 5), (400, 5), (1016, 1), (1017, 2), (5, 1)])
def test_windows(source, length, count):
    windows = long_windows(source, Bytes(), length, count)
    assert (windows.shape, windows.dtype) == ((count, length + 1), np.int32)
    assert set(windows[:, 0]) == {Bytes.bos_id}
    texts = [bytes(w[1:].tolist()).decode() for w in windows]
    firsts = [TEXT.index(t) for t in texts]
    # From the very beginning to the very end, evenly; the index is the first of equal texts.
    assert firsts[0] == 0
    assert all(t in TEXT and len(t) == length for t in texts)
    if count > 1:
        assert texts[-1] == TEXT[-length:]


def test_without_a_start_token(tmp_path, source):
    tokenizer = load_tokenizer(samples.make_tiktoken(tmp_path))
    (window,) = long_windows(source, tokenizer, 50, 1)
    assert TEXT.startswith(tokenizer.decode(window.tolist()))
    assert len(window) == 51


def test_the_longest_window_is_the_longest_possible(tmp_path, source):
    for tokenizer in (Bytes(), load_tokenizer(samples.make_tiktoken(tmp_path))):
        length = longest_window(source, tokenizer)
        assert long_windows(source, tokenizer, length, 1).shape == (1, length + 1)
        with pytest.raises(ValueError, match=f"for windows of length={length + 1}"):
            long_windows(source, tokenizer, length + 1, 1)


@pytest.mark.parametrize(("length", "count"), [(-5, 1), (0, 1), (5, 0), (5, -1)])
def test_windows_that_are_none(source, length, count):
    name = "length" if length < 1 else "count"
    with pytest.raises(ValueError, match=f"long_windows: {name}=.*; allowed: a number >= 1"):
        long_windows(source, Bytes(), length, count)


def test_conversations_are_no_text(tmp_path):
    (tmp_path / "a.chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=r"a\.chat\.jsonl' holds chat; allowed: a text"):
        long_windows(str(tmp_path / "a.chat.jsonl"), Bytes(), 1, 1)


def test_a_text_too_short(source):
    with pytest.raises(ValueError, match=r"a\.txt' has 1017 tokens; allowed: at least 1018, for w"):
        long_windows(source, Bytes(), 1018, 1)
