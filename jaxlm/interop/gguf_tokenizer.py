"""A GGUF file's vocabulary and merges as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

# Kinds of token in GGUF (llama.cpp): 3 is a control token, 4 one that a user added.
CONTROL, USER_DEFINED = 3, 4


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merges, by the file's name for it.
PRE_TOKENIZERS = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level()]
    ),
    "llama-bpe": lambda: _split(LLAMA3),
    "qwen2": lambda: _split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def stop_ids(metadata: dict[str, Any]) -> list[int]:
    """Ids that end a text, a turn or a message."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return [metadata[name] for name in names if name in metadata]


def tokenizer_json(metadata: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json, and what a tokenizer_config.json beside it would say.

    Raises:
        ValueError: a kind of tokenizer, or of cutting text, that is not known; no such tokenizer.
    """
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(f"{where}: tokenizer.ggml.model={kind!r}; allowed: gpt2")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{where}: tokenizer.ggml.pre={pre!r}; allowed: {known}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges", [])]
    try:
        inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{where}: its merges are no byte pair encoding: {error}") from error
    inner.pre_tokenizer = PRE_TOKENIZERS[pre]()
    inner.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == CONTROL:
            inner.add_special_tokens([AddedToken(token, special=True)])
        elif kind == USER_DEFINED:
            inner.add_tokens([AddedToken(token)])

    def named(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(tokens):
            allowed = f"0 to {len(tokens) - 1}"
            raise ValueError(f"{where}: {name}_token_id={index}; allowed: {allowed}")
        return tokens[index]

    begins = metadata.get("tokenizer.ggml.add_bos_token", False)
    config = {
        "eos_token": named("eos"),
        "bos_token": named("bos"),
        "add_bos_token": begins,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    return inner.to_str(), config
