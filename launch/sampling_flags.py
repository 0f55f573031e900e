"""Flags of how tokens are drawn: arguments of `jaxlm.generate` by the same names."""

from __future__ import annotations

from typing import Any

from absl import flags

FLOATS: dict[str, tuple[Any, str]] = {
    "temperature": (0.0, "0 is greedy."),
    "top_p": (1.0, "Only the smallest set of tokens with this mass."),
    "min_p": (None, "Only tokens at least so many times as probable as the most probable one."),
    "typical_p": (None, "Only tokens of about expected surprise, of this mass together."),
    "repetition_penalty": (None, "Above 1: tokens of prompt and output are less probable."),
    "frequency_penalty": (None, "Taken from a logit each time that its token was drawn."),
    "presence_penalty": (None, "Taken from a logit once its token was drawn."),
}
INTEGERS: dict[str, tuple[Any, str]] = {
    "top_k": (0, "Only the k most probable tokens; 0: all."),
    "no_repeat_ngram_size": (None, "No sequence of so many tokens twice."),
    "min_new_tokens": (None, "No end before so many tokens."),
    "seed": (0, "Of the draws."),
}
SETTINGS = [
    *(flags.DEFINE_float(name, *given) for name, given in FLOATS.items()),
    *(flags.DEFINE_integer(name, *given) for name, given in INTEGERS.items()),
]
STOP = flags.DEFINE_multi_string(
    "stop", [], "Ends the text where it would be said; may be given several times."
)
N = flags.DEFINE_integer("n", 1, "Continuations of each prompt.")
BEST_OF = flags.DEFINE_integer("best_of", None, "How many to draw of each, the n best being shown.")


def given() -> dict[str, Any]:
    """Arguments of `jaxlm.generate` and `jaxlm.stream`."""
    found = {flag.name: flag.value for flag in SETTINGS}
    return {n: v for n, v in found.items() if v is not None} | {"stop": STOP.value}


def several() -> dict[str, Any]:
    """More arguments of `jaxlm.generate`, where anything but a single text is asked for."""
    if N.value == 1 and BEST_OF.value is None:
        return {}
    return {"n": N.value, "best_of": BEST_OF.value}
