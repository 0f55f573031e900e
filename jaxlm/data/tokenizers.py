"""Text to token ids and back, behind one small protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlm.config import fits
from jaxlm.data.optional import optional
from jaxlm.interop.hub_config import HubConfig, read_json

# Of tokenizer_config.json's keys, each with "_token" behind.
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Names that end-of-text and start-of-text tokens go by, most telling first.
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
START_TOKENS = ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]")


def _utf8(text: str) -> bytes:
    """The text's bytes, if it has any: every kind of tokenizer would fail in a way of its own."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(error.start - 20, 0) : error.start + 20]
        raise ValueError(
            f"text …{near!r}… is not UTF-8 at character {error.start} "
            f"({text[error.start]!r}); allowed: whole characters"
        ) from error


@runtime_checkable
class Tokenizer(Protocol):
    """What the library needs of a tokenizer.

    Attributes:
        name: e.g. "bytes" or the file it came from.
        fingerprint: SHA-256 of all that ids depend on: data tokenized with another one is another
            data set.
        vocab_size: ids are below it.
        bos_id: begins every document, if there is one.
        eos_id: ends every document.
        stop_ids: end what a model says: eos_id, and those that end a turn of a chat.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end tokens; what looks like a special token is text.

        Raises:
            ValueError: the text holds half a surrogate pair, which is no character.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no whole character become U+FFFD.

        Special tokens are left out, and so are ids from vocab_size on: a model's vocabulary is
        rounded up, and an untrained one draws them.
        """
        ...

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` needs."""
        ...


class Bytes:
    """The 256 bytes of UTF-8, then a start and an end token: 258 ids."""

    name = "bytes"
    fingerprint = hashlib.sha256(b"jaxlm bytes 1").hexdigest()
    vocab_size = 258
    bos_id: int | None = 256
    eos_id = 257
    stop_ids: tuple[int, ...] = (257,)

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes below 256."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """One small file; and for other libraries the same as a tokenizer.json."""
        _write_kind(folder, "bytes")
        (Path(folder) / TOKENIZER).write_text(_bytes_json(), encoding="utf-8")
        _write_json(Path(folder) / CONFIG, _special_tokens(BYTES_START, BYTES_END))


BYTES_START, BYTES_END = START_TOKENS[0], END_TOKENS[0]


def _bytes_json() -> str:
    """Every character as the bytes that it falls back to, none of which are merged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    letters = {f"<0x{i:02X}>": i for i in range(256)}
    inner = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    specials = (BYTES_START, BYTES_END)
    inner.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    _begin(inner, Bytes.bos_id)
    return inner.to_str()


def _begin(inner: Any, bos_id: int | None) -> bool:
    """Makes texts begin with the start token where others encode them; whether they did not."""
    from tokenizers import processors

    if bos_id is None or bos_id in inner.encode("").ids[:1]:
        return False
    start = inner.id_to_token(bos_id)
    template = processors.TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", start, "$B:1"], special_tokens=[(start, bos_id)]
    )
    before = inner.post_processor
    inner.post_processor = template if before is None else processors.Sequence([before, template])
    return True


class HuggingFace:
    """A tokenizer.json of the `tokenizers` library.

    The end token is the one that a tokenizer_config.json beside it names, or a well-known one. A
    start token that it names counts if texts do begin with it: as add_bos_token says, or by what
    the tokenizer itself adds to a text.

    Args:
        data: the file.
        config: its tokenizer_config.json; empty: there is none.
        name: where they are from.
        stop_ids: more ids that end what a model says, beside the end token.

    Attributes:
        chat_template: Jinja text that writes a conversation; None: there is none.

    Raises:
        ValueError: not such a file, or no end token is known.
    """

    def __init__(
        self, data: bytes, config: Mapping[str, Any], name: str, stop_ids: Sequence[Any] = ()
    ):
        import tokenizers

        self.config, self.name = config, name
        self._about = HubConfig(config, f"{name}, {CONFIG}")
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing more exact
            raise ValueError(f"{name} is no tokenizer.json: {error}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        if not self._inner.get_vocab_size():
            raise ValueError(f"{name} has no tokens; allowed: a vocabulary")
        # Others are to begin texts as a model of this one was trained.
        self.bos_id = self._start()
        self._data = self._inner.to_str().encode() if _begin(self._inner, self.bos_id) else data
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        stated = self._stated("eos_token")
        if stated is not None and self._inner.token_to_id(stated) is None:
            raise ValueError(
                f"{self._about.name}: eos_token={stated!r}; allowed: one of its tokens"
            )
        end = self._first([stated, *END_TOKENS])
        if end is None:
            special = ", ".join(t.content for t in self._inner.get_added_tokens_decoder().values())
            raise ValueError(
                f"{name}: no end-of-text token among its special tokens ({special}); name it as "
                'eos_token in a tokenizer_config.json beside it: {"eos_token": "…"}'
            )
        self.eos_id = end
        for i in stop_ids:
            if not fits(i, int) or not 0 <= i < self.vocab_size:
                allowed = f"integers from 0 to {self.vocab_size - 1}"
                raise ValueError(
                    f"{name}: eos_token_id={i!r} of its generation; allowed: {allowed}"
                )
        self.stop_ids = tuple(sorted({end, *stop_ids}))
        self.chat_template = _chat_template(self._about)
        template = () if self.chat_template is None else (self.chat_template,)
        self.fingerprint = _sha256(self._data, self.bos_id, self.eos_id, *template)

    @classmethod
    def from_file(cls, path: str | Path) -> HuggingFace:
        """From a tokenizer.json and, if they are beside it, tokenizer_config.json,
        chat_template.jinja, and the stop tokens of generation_config.json, or else of config.json.
        """
        config, generation = (_json_beside(path, n) for n in (CONFIG, GENERATION))
        template = Path(path).with_name(TEMPLATE)
        if template.is_file():
            try:
                config["chat_template"] = template.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{template}: {error}; allowed: UTF-8") from error
        made = cls(Path(path).read_bytes(), config, str(path), _ends(generation))
        if not Path(path).with_name(GENERATION).is_file():
            # There it may be an architecture's own, outside of this vocabulary.
            model = _ends(_json_beside(path, MODEL))
            known = {i for i in model if fits(i, int) and 0 <= i < made.vocab_size}
            made.stop_ids = tuple(sorted({*made.stop_ids, *known}))
        return made

    def special_texts(self) -> dict[str, str]:
        """What its config names of special tokens, by "pad_token" and the like."""
        named = {name: self._stated(f"{name}_token") for name in SPECIAL}
        return {f"{name}_token": text for name, text in named.items() if text is not None}

    def special_text(self, name: str) -> str:
        """What "bos_token" or "eos_token" is written as; empty: there is none."""
        return self._stated(name) or ""

    def encode_special(self, text: str) -> list[tuple[int, int, int]]:
        """Ids as the file says, and where in the text each begins and ends; what looks like a
        special token is one.
        """
        _utf8(text)
        self._inner.encode_special_tokens = False
        try:
            found = self._inner.encode(text, add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = True
        return [(i, *span) for i, span in zip(found.ids, found.offsets, strict=True)]

    def _stated(self, name: str) -> str | None:
        """A special token's text in the config, if it has it."""
        value = self._about.get(name, None, str | dict)
        if isinstance(value, dict):
            return HubConfig(value, f"{self._about.name}: {name}").require("content", str)
        return value

    def _first(self, names: Sequence[str | None]) -> int | None:
        ids = (self._inner.token_to_id(n) for n in names if n is not None)
        return next((i for i in ids if i is not None), None)

    def _start(self) -> int | None:
        begins = self._about.get("add_bos_token", None, bool)
        if begins is False:
            return None
        stated = self._first([self._stated("bos_token")])
        if stated is None:
            return self._first(START_TOKENS)
        return stated if begins or stated in self._inner.encode("").ids[:1] else None

    def encode(self, text: str) -> list[int]:
        """Ids as the file says, without the special tokens it would add."""
        _utf8(text)
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """As the file says."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """The file, its tokenizer_config.json, and stop tokens in a generation_config.json."""
        _write_kind(folder, "huggingface")
        (Path(folder) / TOKENIZER).write_bytes(self._data)
        start = None if self.bos_id is None else self._inner.id_to_token(self.bos_id)
        end = str(self._inner.id_to_token(self.eos_id))
        said = {name: value for name, value in self.config.items() if value is not None}
        _write_json(Path(folder) / CONFIG, _special_tokens(start, end) | said)
        if len(self.stop_ids) > 1:
            _write_json(Path(folder) / GENERATION, {"eos_token_id": list(self.stop_ids)})


TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
MODEL = "config.json"


def _special_tokens(start: str | None, end: str) -> dict[str, str]:
    """What a tokenizer_config.json says of them; and that tokenizer.json says all else, which
    transformers would guess by the model's architecture.
    """
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    return said if start is None else {**said, "bos_token": start}


def _ends(config: Mapping[str, Any]) -> list[Any]:
    """What a config says of the ids that end a text: none, one or several."""
    ends = config.get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _json_beside(path: str | Path, name: str) -> dict[str, Any]:
    """A JSON file in the same folder; empty if there is none."""
    beside = Path(path).with_name(name)
    return read_json(beside) if beside.is_file() else {}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chat_template(about: HubConfig) -> str | None:
    """The template, of several by name the default one."""
    template = about.get("chat_template", None, str | list)
    if isinstance(template, list):
        parts = [t if isinstance(t, dict) else {} for t in template]
        each = [HubConfig(t, f"{about.name}: chat_template") for t in parts]
        named = {t.require("name", str): t.require("template", str) for t in each}
        return named.get("default")
    return template


class SentencePiece:
    """A SentencePiece .model file.

    Its normalization may change a text for good: many models join spaces and drop line ends.

    Raises:
        ValueError: not such a file, or it has no end token.
    """

    def __init__(self, path: str | Path):
        sentencepiece = optional("sentencepiece", str(path))
        self._path, self.name = Path(path), str(path)
        data = self._path.read_bytes()
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model: {error}") from error
        self.vocab_size = self._inner.get_piece_size()
        if self._inner.eos_id() < 0:
            raise ValueError(f"{path}: the model has no end token; allowed: one with eos_id >= 0")
        self.eos_id = self._inner.eos_id()
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        self.bos_id: int | None = self._inner.bos_id() if self._inner.bos_id() >= 0 else None
        self.fingerprint = _sha256(data)

    def encode(self, text: str) -> list[int]:
        """Pieces' ids."""
        _utf8(text)
        return self._inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """As the model says."""
        special = (self.bos_id, self.eos_id)
        return self._inner.decode([i for i in ids if i not in special and i < self.vocab_size])

    def save(self, folder: str | Path) -> None:
        """The model file."""
        _write_kind(folder, "sentencepiece")
        _copy(self._path, Path(folder) / "tokenizer.model")


class Tiktoken:
    """A .tiktoken rank file, split by GPT-4's pattern; one end token is added after the ranks.

    Raises:
        ValueError: not such a file, a byte has no rank, or a rank is given twice.
    """

    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path: str | Path):
        tiktoken = optional("tiktoken", str(path))
        self._path, self.name = Path(path), str(path)
        data = self._path.read_bytes()
        ranks = _ranks(data, str(path))
        self.eos_id = max(ranks.values()) + 1
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        self.vocab_size = self.eos_id + 1
        self.bos_id: int | None = None
        self.fingerprint = _sha256(data)
        self._known = frozenset(ranks.values())
        self._inner = tiktoken.Encoding(
            name=self._path.stem,
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.eos_id},
        )

    def encode(self, text: str) -> list[int]:
        """Ids by byte pair merges."""
        _utf8(text)
        return self._inner.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' bytes, joined."""
        return self._inner.decode([i for i in ids if i in self._known])

    def save(self, folder: str | Path) -> None:
        """The rank file."""
        _write_kind(folder, "tiktoken")
        _copy(self._path, Path(folder) / "tokenizer.tiktoken")


def _ranks(data: bytes, path: str) -> dict[bytes, int]:
    """The token of each line and its rank: base64, a space, a number."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no token and rank: {error}") from error
    if len(set(ranks.values())) < len(ranks):
        raise ValueError(f"{path}: a rank is given twice; allowed: one token for each rank")
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ValueError(f"{path}: no rank for the bytes {missing}; allowed: one for every byte")
    return ranks


def _sha256(data: bytes, *also: int | str | None) -> str:
    return hashlib.sha256(data + repr(also).encode()).hexdigest()


KIND = "kind.json"
_SAVED: dict[str, Any] = {
    "bytes": lambda folder: Bytes(),
    "huggingface": lambda folder: HuggingFace.from_file(folder / TOKENIZER),
    "sentencepiece": lambda folder: SentencePiece(folder / "tokenizer.model"),
    "tiktoken": lambda folder: Tiktoken(folder / "tokenizer.tiktoken"),
}


def _write_kind(folder: str | Path, kind: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / KIND).write_text(json.dumps({"kind": kind}) + "\n")


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: "bytes"; the path of a tokenizer.json, .model (SentencePiece) or .tiktoken file; or a
            folder with a tokenizer.json or one that `save` wrote.

    Raises:
        ValueError: none of these.
        FileNotFoundError: no such file.
    """
    if spec == "bytes":
        return Bytes()
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(
            f"tokenizer={spec!r}: no such file; allowed: bytes, bpe:SIZE, or the path of a "
            "tokenizer.json, .model or .tiktoken file"
        )
    if (path / KIND).is_file():
        kind = read_json(path / KIND).get("kind")
        if not isinstance(kind, str) or kind not in _SAVED:
            raise ValueError(f"{path / KIND}: kind={kind!r}; allowed: {', '.join(_SAVED)}")
        try:
            return _SAVED[kind](path)
        except OSError as error:
            raise FileNotFoundError(f"{path / KIND}: kind={kind!r}, but {error}") from error
    if path.is_dir():
        path = path / TOKENIZER
        if not path.is_file():
            raise FileNotFoundError(
                f"{spec} has no {TOKENIZER}; allowed: a folder with one, or the path of a .json, "
                ".model or .tiktoken file"
            )
    kinds: dict[str, Any] = {
        ".json": HuggingFace.from_file,
        ".model": SentencePiece,
        ".tiktoken": Tiktoken,
    }
    if path.suffix not in kinds or not path.is_file():
        raise ValueError(f"tokenizer={spec!r}; allowed: a .json, .model or .tiktoken file")
    return kinds[path.suffix](path)
