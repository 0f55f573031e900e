"""How text is cut before merges, by GGUF's name for it (tokenizer.ggml.pre).

Each is a sequence of patterns; what one finds, and what lies between, is cut further by the next.
The names and patterns are those of llama.cpp's src/llama-vocab.cpp, patterns in the form that the
models' own tokenizer.json has where llama.cpp had to reword them.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers

END = r"|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + END
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + END
)
QWEN2 = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(ending: str) -> str:
    """Capitals, then small letters, of which either may be missing, and what is around them."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"


_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + END
TEKKEN = _words("") + r"|\p{N}" + _OTHERS
GPT4O = _words("(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _OTHERS
DIGITS, THREE = r"\p{N}", "[0-9][0-9][0-9]"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", THREE),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), (GPT2,)),
    **dict.fromkeys(("gigachat", "mellum", "modern-bert", "trillion"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (DIGITS, GPT2)),
    **dict.fromkeys(("codeshell", "exaone", "minerva-7b"), (DIGITS, GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), (GPT4,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (GPT4,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (QWEN2,)),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM,)),
    "viking": (BLOOM, DIGITS),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (GPT4O,)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS),
}
# A piece that is a token stays whole, whatever the merges; and texts begin with the start token.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken"}
# The hub's tokenizers compose characters first (NFC).
COMPOSED = {"qwen2"}


def pre_tokenizer(name: str, where: str) -> Any:
    """The cutting of that name, then bytes as GPT-2's letters.

    Raises:
        ValueError: it is not known.
    """
    if name not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise ValueError(f"{where}: tokenizer.ggml.pre={name!r}; allowed: {known}")
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, letters])
