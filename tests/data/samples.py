"""Small real files of every format, and small tokenizers of every kind."""

import gzip
import json
import random
from pathlib import Path

import sentencepiece
import tokenizers
import zstandard

from jaxlm.data.config import SourceConfig
from jaxlm.data.sources import documents, kind_of
from jaxlm.data.train_bpe import train_bpe

TEXTS = [
    "It is a truth universally acknowledged,\n\nthat a single man …",
    "Сүхбаатар 北京 🙂 e\u0301",
    '  indented "quoted" \\ text\twith tabs',
]


def write_text(folder, texts):
    path = folder / "a.txt"
    path.write_bytes("\n\n\n".join(texts).encode())
    return path


def write_code(folder, texts):
    """One document a file, so the texts become a folder of files."""
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.py").write_bytes(text.encode())
    return folder / "*.py"


def jsonl_bytes(texts, field="text"):
    return b"".join(json.dumps({"id": 1, field: t}).encode() + b"\n" for t in texts)


def write_jsonl(folder, texts, field="text"):
    path = folder / "a.jsonl"
    path.write_bytes(jsonl_bytes(texts, field))
    return path


def write_parquet(folder, texts, field="text"):
    import pyarrow
    import pyarrow.parquet

    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path)
    return path


def write_array_record(folder, texts):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = folder / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    return path


def write_datasets(folder, texts, field="text"):
    import datasets

    datasets.disable_progress_bars()
    path = folder / "a"
    columns = {"id": list(range(len(texts))), field: texts}
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    return path


def write_chat(folder, texts):
    """Each text said by a user."""
    path = folder / "a.chat.jsonl"
    talks = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return path


def write_preference(folder, texts):
    """Each text the prompt."""
    path = folder / "a.preference.jsonl"
    said = [{"role": "user", "content": text} for text in texts]
    answer = [{"role": "assistant", "content": "x"}]
    pairs = [{"prompt": [one], "chosen": answer, "rejected": answer} for one in said]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def texts_of(source):
    """Its documents; of conversations, what was said first."""
    found, kind = list(documents(source)), kind_of(source)
    if kind == "text":
        return found
    talks = [json.loads(t) for t in found]
    return [talk["messages" if kind == "chat" else "prompt"][0]["content"] for talk in talks]


# A new format in jaxlm.data.formats.FORMATS needs a line here, or its tests fail.
WRITERS = {
    "text": write_text,
    "code": write_code,
    "jsonl": write_jsonl,
    "chat": write_chat,
    "preference": write_preference,
    "parquet": write_parquet,
    "array_record": write_array_record,
    "datasets": write_datasets,
}
COMPRESS = {"": lambda b: b, ".gz": gzip.compress, ".zst": zstandard.compress}


def training_text() -> str:
    (text,) = documents(SourceConfig("builtin:austen_valid"))
    return text[:60_000]


def make_bpe(folder: Path) -> str:
    path = folder / "bpe" / "tokenizer.json"
    train_bpe([training_text()], 400, path)
    return str(path)


def make_gpt2(folder: Path) -> str:
    """As GPT-2's: byte level, <|endoftext|> alone is special; truncation and padding left on."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([training_text()], trainer)
    inner.enable_truncation(5)
    inner.enable_padding(length=64)
    (folder / "gpt2").mkdir()
    path = folder / "gpt2" / "tokenizer.json"
    inner.save(str(path))
    config = {
        "bos_token": None,
        "eos_token": {"content": "<|endoftext|>", "lstrip": False},
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        "model_max_length": 1024,
    }
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def make_sentencepiece(folder: Path, **settings) -> str:
    """Of the lossless kind: no normalization, all spaces kept, bytes for what it has not seen."""
    name = str(folder / f"sp{len(settings)}")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text().split("\n\n")),
        model_prefix=name,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return f"{name}.model"


def tiktoken_ranks(num_merges=100) -> dict[bytes, int]:
    """All bytes in a shuffled order, then pairs of what is there already."""
    generator = random.Random(0)
    tokens = [bytes([i]) for i in generator.sample(range(256), 256)]
    words = training_text().encode()
    while len(tokens) < 256 + num_merges:
        at = generator.randrange(len(words) - 2)
        if words[at : at + 2] not in tokens:
            tokens.append(words[at : at + 2])
    return {token: rank for rank, token in enumerate(tokens)}


def rank_lines(ranks) -> bytes:
    import base64

    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items())


def make_tiktoken(folder: Path) -> str:
    path = folder / "tiny.tiktoken"
    path.write_bytes(rank_lines(tiktoken_ranks()))
    return str(path)


TOKENIZERS = {
    "bytes": lambda folder: "bytes",
    "bpe": make_bpe,
    "gpt2": make_gpt2,
    "sentencepiece": make_sentencepiece,
    "tiktoken": make_tiktoken,
}
