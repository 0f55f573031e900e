"""What holds for every kind of tokenizer, and what each file may have wrong with it."""

import itertools
import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.data.config import DataConfig
from jaxlm.data.loader import open_tokenizer
from jaxlm.data.optional import MissingPackageError
from jaxlm.data.tokenizers import _SAVED, Tokenizer, load_tokenizer
from jaxlm.data.train_bpe import train_bpe
from tests.data import samples
from tests.data.samples import TOKENIZERS

SPECIAL_LOOKS = ["<|endoftext|>", "<|bos|>", "<s>", "</s>", "<unk>", "[SEP]"]
# SentencePiece writes a space as U+2581 and reads that back as a space.
unicode = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"))
texts = unicode | st.lists(unicode | st.sampled_from(SPECIAL_LOOKS)).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(make(folder)) for name, make in TOKENIZERS.items()}


each = pytest.mark.parametrize("name", TOKENIZERS)


def test_every_kind_is_among_them(made, tmp_path):
    kinds = set()
    for name, tokenizer in made.items():
        tokenizer.save(tmp_path / name)
        kinds.add(json.loads((tmp_path / name / "kind.json").read_text())["kind"])
        assert isinstance(tokenizer, Tokenizer)
    assert kinds == set(_SAVED)


@each
@given(text=texts)
@example(text=" \n\n two  spaces\r\n\ttab\0nul \ufffd \U0010ffff 12345 é e\u0301 <|endoftext|>")
def test_any_text_comes_back(made, name, text):
    tokenizer = made[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    # What looks like a special token is text, else a document could end another.
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@each
@given(text=texts)
def test_special_tokens_are_left_out_of_the_text(made, name, text):
    tokenizer = made[name]
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    assert tokenizer.decode([*special, *tokenizer.encode(text), *special]) == text


@each
@given(data=st.data())
def test_any_ids_have_a_text(made, name, data):
    """A model's vocabulary is rounded up, so that it can draw ids that no token has."""
    tokenizer = made[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 64)))
    assert isinstance(tokenizer.decode(ids), str)
    known = [i for i in ids if i < tokenizer.vocab_size]
    assert tokenizer.decode(ids) == tokenizer.decode(known)


@each
@given(text=texts)
def test_saved_and_loaded_it_is_the_same(made, tmp_path_factory, name, text):
    tokenizer = made[name]
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    again = load_tokenizer(str(folder))
    for attribute in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)
    assert again.encode(text) == tokenizer.encode(text)
    again.save(folder)  # onto itself
    assert load_tokenizer(str(folder)).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
@given(text=unicode)
def test_others_read_the_same_ids(made, tmp_path_factory, name, text):
    """A tokenizer.json that begins texts with the start token, once, and names both tokens."""
    tokenizer, folder = made[name], tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    load_tokenizer(str(folder)).save(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.no_truncation()
    inner.no_padding()
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert inner.encode(text).ids == start + tokenizer.encode(text)
    assert inner.decode(inner.encode(text).ids) == text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {n: config.get(f"{n}_token") for n in ("bos", "eos")}
    named["eos"] = named["eos"]["content"] if name == "gpt2" else named["eos"]
    ids = {n: None if t is None else inner.token_to_id(t) for n, t in named.items()}
    assert ids == {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@each
@pytest.mark.parametrize(("before", "half"), [("", "\udcff\udcfe"), ("long text, " * 99, "\ud83d")])
def test_half_a_surrogate_pair_is_no_text(made, name, before, half):
    """The command line gives these for bytes that are not UTF-8, and JSON may hold them."""
    message = rf"text …'.*'… is not UTF-8 at character {len(before)} \('\\ud"
    with pytest.raises(ValueError, match=message) as error:
        made[name].encode(before + half)
    assert len(str(error.value)) < 200


def test_fingerprints_differ(made):
    assert len({t.fingerprint for t in made.values()}) == len(made)
    assert all(len(t.fingerprint) == 64 for t in made.values())


def test_known_ids(made):
    assert made["bytes"].encode("é") == [0xC3, 0xA9]
    assert (made["bytes"].vocab_size, made["bpe"].vocab_size) == (258, 400)
    assert (made["bpe"].bos_id, made["bpe"].eos_id) == (0, 1)
    assert (made["gpt2"].bos_id, made["gpt2"].eos_id) == (None, 0)
    # All ids of numbers are single digits'.
    digits = {made["bpe"].encode(d)[0] for d in "0123456789"}
    assert set(made["bpe"].encode("31415926 + 1984")[:8]) <= digits


def test_tiktoken_against_merges_by_hand(made):
    """One word is split by no pattern: merge the pair of lowest rank, again and again."""
    ranks = samples.tiktoken_ranks()

    def merged(data):
        parts = [bytes([b]) for b in data]
        while True:
            pairs = [
                (ranks[a + b], i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in ranks
            ]
            if not pairs:
                return [ranks[p] for p in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    for word in ("acknowledged", "Elizabeth", "possession", "there"):
        assert made["tiktoken"].encode(word) == merged(word.encode())


def test_truncation_and_padding_of_a_file_are_off(made):
    words = "one two three four five six seven eight nine ten"
    assert made["gpt2"].decode(made["gpt2"].encode(words)) == words


def rewritten(folder, **config):
    """The GPT-2-like tokenizer with another tokenizer_config.json."""
    path = samples.make_gpt2(folder)
    (folder / "gpt2" / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_the_config_beside_a_file_names_the_end_token(made, tmp_path):
    path = rewritten(tmp_path, eos_token="!")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("!") == [tokenizer.eos_id]
    # Another end token gives other rows, so it is another tokenizer.
    assert tokenizer.fingerprint != made["gpt2"].fingerprint


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json: no end-of-text token .* eos_token"):
        load_tokenizer(str(path))
    with pytest.raises(ValueError, match=r"the model has no end token; allowed: one with eos_id"):
        load_tokenizer(samples.make_sentencepiece(tmp_path, eos_id=-1))


def test_sentencepiece_without_a_start_token(tmp_path):
    tokenizer = load_tokenizer(samples.make_sentencepiece(tmp_path, bos_id=-1))
    assert tokenizer.bos_id is None
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"


BROKEN = {
    "a.json": (b'{"model": 5}', r"a\.json is no tokenizer\.json: "),
    "b.json": (b"\xff\xfe", r"b\.json is no tokenizer\.json: "),
    "a.model": (b"not a model", r"a\.model is no SentencePiece model: "),
    "a.tiktoken": (b"YQ== 0\nnonsense\n", r"a\.tiktoken, line 2 is no token and rank: "),
    "b.tiktoken": (b"YQ== 0\n!!!! 1\n", r"b\.tiktoken, line 2 is no token and rank: "),
    "c.tiktoken": (b"YQ== 0\n", r"c\.tiktoken: no rank for the bytes \[0, 1, 2, .*allowed: one"),
    "a.txt": (b"a", r"tokenizer='.*a\.txt'; allowed: a \.json, \.model or \.tiktoken file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer='no\.json': no such file; allowed: b"):
        load_tokenizer("no.json")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; allowed: a folder with"):
        load_tokenizer(str(tmp_path))  # a folder without a tokenizer.json


def test_ranks_given_twice_are_refused(tmp_path):
    ranks = samples.tiktoken_ranks()
    ranks[b"again"] = 300
    (tmp_path / "a.tiktoken").write_bytes(samples.rank_lines(ranks))
    with pytest.raises(ValueError, match=r"a\.tiktoken: a rank is given twice; allowed: one"):
        load_tokenizer(str(tmp_path / "a.tiktoken"))


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    path = TOKENIZERS[name](tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=rf"needs {name}: pip install -e"):
        load_tokenizer(path)


TRAIN = """
import sys
from jaxlm.data.train_bpe import train_bpe
from tests.data.samples import training_text
train_bpe([training_text()], 400, sys.argv[1])
"""


def test_training_gives_the_same_bytes_in_every_process(tmp_path):
    """Hash tables are seeded anew in each process; ids must not depend on that."""
    path = samples.make_bpe(tmp_path)
    other = tmp_path / "other.json"
    subprocess.run([sys.executable, "-c", TRAIN, other], check=True)
    with open(path, "rb") as file:
        assert file.read() == other.read_bytes()


def test_training_joins_what_is_frequent(tmp_path):
    """Oracle: the first merges of "abab…" are known."""
    path = tmp_path / "tokenizer.json"
    train_bpe(["ab" * 64 + " cd"] * 3, 260, path)
    tokenizer = load_tokenizer(str(path))
    assert len(tokenizer.encode("abab")) == 1
    assert len(tokenizer.encode("ab")) == 1
    assert len(tokenizer.encode("cd")) == 2


def test_training_errors(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"vocab_size=257; allowed: >= 258"):
        train_bpe(["a"], 257, path)

    def texts():
        yield "a"
        raise ValueError("a.txt is empty")

    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        train_bpe(texts(), 300, path)
    assert not path.exists()


def test_a_run_trains_its_tokenizer_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(samples.training_text())
    config = DataConfig(sources=(str(tmp_path / "a.txt"),), tokenizer="bpe:300")
    cache = tmp_path / "cache"
    first = open_tokenizer(config, cache)
    assert first.vocab_size == 300
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.data.loader.train_bpe", None)
        assert open_tokenizer(config, cache).fingerprint == first.fingerprint
    (tmp_path / "a.txt").write_text(samples.training_text()[:30_000])
    assert open_tokenizer(config, cache).fingerprint != first.fingerprint


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:many", "bpe:²", "bpe:-5"])
def test_bpe_without_a_size(tmp_path, spec):
    with pytest.raises(ValueError, match=r"tokenizer='bpe.*'; allowed: bpe:SIZE, as in bpe:4096"):
        open_tokenizer(DataConfig(tokenizer=spec), tmp_path)


def test_many_sources_still_have_a_folder_name(tmp_path):
    """File systems allow 255 bytes."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"number {i} ")
    config = DataConfig(
        sources=tuple(str(tmp_path / f"{i}.txt") for i in range(40)), tokenizer="bpe:258"
    )
    assert open_tokenizer(config, tmp_path / "cache").vocab_size == 258
