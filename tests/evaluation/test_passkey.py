"""The task is as its protocol says, and a model that looks up is told from one that cannot."""

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from jaxlm.data.tokenizers import HuggingFace
from jaxlm.evaluation import passkey
from tests.decoding import tiny
from tests.evaluation.planted import planted


@pytest.mark.parametrize("length", [400, 1000])
def test_a_text_is_filled_and_names_its_key_twice(length):
    made = passkey.make(length, tiny.TOKENIZER, 50)
    assert made == passkey.make(length, tiny.TOKENIZER, 50)
    assert made != passkey.make(length, tiny.TOKENIZER, 50, seed=1)
    for one in made:
        size = 1 + len(tiny.TOKENIZER.encode(one.prompt))  # with a start token
        assert length - len(passkey.FILLER) < size <= length
        assert one.prompt.count(str(one.key)) == 2 and 1 <= one.key < 10**7
        text = one.prompt.removeprefix(passkey.TASK).removesuffix(passkey.QUESTION)
        before, after = text.split(passkey.KEY.format(key=one.key))
        assert len(before) / len(before + after) == pytest.approx(one.depth)
    depths = {one.depth for one in made}
    copies = round(1 / min(depths - {0}))
    assert depths == {n / copies for n in range(copies + 1)}


def test_the_first_number_of_an_answer_counts():
    assert passkey.is_found(" 4711. The", 4711) and passkey.is_found("4711", 4711)
    for answer in ("", " 47 11", " 47110", " 12 or 4711", " four"):
        assert not passkey.is_found(answer, 4711)


LENGTH, COUNT = 400, 3


@pytest.fixture(scope="module")
def looks_up():
    """A model that continues a word as it was continued before, and a tokenizer of words, to which
    a key is two: the first is said by the prompt, the second by the cache.
    """
    texts = [one.prompt for one in passkey.make(LENGTH, tiny.TOKENIZER, COUNT)]
    halves = pre_tokenizers.Split(tokenizers.Regex(r"\d{1,4}"), "isolated")
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), halves])
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(sorted(words))}, unk_token="a")
    )
    inner.pre_tokenizer, inner.decoder = split, tokenizers.decoders.Fuse()
    inner.add_special_tokens(["</s>"])
    words_of = HuggingFace(inner.to_str().encode(), {}, "words")
    return (*planted(words_of.vocab_size, 512, False, says=True), words_of)


@pytest.mark.parametrize(
    ("cache", "share"),
    [
        pytest.param("dense", 1, marks=pytest.mark.slow),
        ("quantized(bits=2, full=32)", 1),
        ("razor(heads=((), (0,)), window=32)", 1),
        ("razor(heads=((0, 1), (1,)), window=32)", 0),
        pytest.param("ring(window=32)", 0, marks=pytest.mark.slow),
    ],
)
def test_what_the_cache_dropped_is_not_found(looks_up, cache, share):
    assert min(1 - one.depth for one in passkey.make(LENGTH, looks_up[-1], COUNT)) > 0
    seen = []
    found = passkey.evaluate_passkey(
        *looks_up, LENGTH, COUNT, cache=cache, track=lambda made: seen.extend(made) or made
    )
    assert found == share and len(seen) == COUNT


def test_no_room_for_a_key_is_told():
    with pytest.raises(ValueError, match=r"length=300; allowed: at least 3.. tokens"):
        passkey.make(300, tiny.TOKENIZER, 1)
    with pytest.raises(ValueError, match="count=0; allowed: an integer >= 1"):
        passkey.make(400, tiny.TOKENIZER, 0)
