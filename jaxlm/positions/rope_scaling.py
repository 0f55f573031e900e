"""How RoPE's frequencies are stretched for contexts longer than the trained one.

Each scaling answers one question: the inverse frequencies of the rotated pairs (radians a token)
and the factor on cosine and sine. Static ones answer in float64 NumPy, once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlm.positions.registry import register


def inverse_frequencies(base: float, width: int) -> np.ndarray:
    """base^(-2i/width), i = 0 … width/2 - 1, float64."""
    return base ** (-np.arange(0, width, 2) / width)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The base: a factor that the context grows by.

    A length-dependent scaling rotates all keys for the context's present length, whenever they were
    cached. What deeper layers computed while the context was shorter stays as it was.
    """

    factor: float = 1.0

    name: ClassVar[str] = ""
    length_dependent: ClassVar[bool] = False

    def __post_init__(self):
        if not self.factor >= 1:
            raise ValueError(f"{self.name}: factor={self.factor!r}; allowed: a number >= 1")
        original = getattr(self, "original_length", 1)
        if original < 1:
            raise ValueError(
                f"{self.name}: original_length={original!r}; allowed: the trained context length"
            )

    def frequencies(self, base: float, width: int, lengths: Any) -> tuple[Any, float]:
        """([width/2] or [batch, length, width/2] inverse frequencies, factor on cos and sin).

        `lengths` [batch, length or 1] of each token's context; only length-dependent scalings
        read it.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!s}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})"


@register
@dataclasses.dataclass(frozen=True)
class Linear(RopeScaling):
    """Position interpolation: every position divided by the factor (Chen et al. 2023)."""

    name: ClassVar[str] = "linear"

    def frequencies(self, base, width, lengths):
        """f / factor."""
        return inverse_frequencies(base, width) / self.factor, 1.0


@register
@dataclasses.dataclass(frozen=True)
class NTK(RopeScaling):
    """NTK-aware: base·factor^(d/(d-2)), which stretches slow pairs fully and fast ones hardly."""

    name: ClassVar[str] = "ntk"

    def frequencies(self, base, width, lengths):
        """Frequencies of the larger base."""
        return inverse_frequencies(base * self.factor ** (width / (width - 2)), width), 1.0


@register
@dataclasses.dataclass(frozen=True)
class DynamicNTK(RopeScaling):
    """NTK-aware with the factor taken from the context's length; unchanged up to the trained one.

    base·(factor·n/L - (factor - 1))^(d/(d-2)) with n = max(length, L), as Hugging Face computes
    it; the length is each document's own, not the batch's, so that none depends on its neighbours.
    """

    original_length: int = 2048

    name: ClassVar[str] = "dynamic_ntk"
    length_dependent: ClassVar[bool] = True

    def frequencies(self, base, width, lengths):
        """[batch, length, width/2]."""
        n = jnp.maximum(lengths, self.original_length).astype(jnp.float32)[..., None]
        stretch = self.factor * n / self.original_length - (self.factor - 1)
        power = jnp.asarray(np.arange(0, width, 2) / (width - 2), jnp.float32)[None, None]
        fixed = jnp.asarray(inverse_frequencies(base, width), jnp.float32)[None, None]
        return fixed * stretch ** (-power), 1.0


@register
@dataclasses.dataclass(frozen=True)
class YaRN(RopeScaling):
    """YaRN: fast pairs kept, slow ones interpolated, a ramp between (Peng et al. 2023, section 3).

    Attributes:
        original_length: the trained context length.
        beta_fast, beta_slow: turns over the trained context at the ends of the ramp.
        attention_factor: on cos and sin; None: 0.1·ln(factor) + 1 (equation 22).
    """

    original_length: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    name: ClassVar[str] = "yarn"

    def frequencies(self, base, width, lengths):
        """The ramp between f and f / factor."""

        def pair_of(turns: float) -> float:
            ratio = self.original_length / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(base))

        low = max(math.floor(pair_of(self.beta_fast)), 0)
        high = min(math.ceil(pair_of(self.beta_slow)), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        f = inverse_frequencies(base, width)
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1
        return f * (1 - ramp) + f / self.factor * ramp, factor


@register
@dataclasses.dataclass(frozen=True)
class LongRoPE(RopeScaling):
    """LongRoPE: a searched divisor per pair, one set for short and one for long contexts.

    (Ding et al. 2024.) The factor on cos and sin is √(1 + ln factor / ln original_length).

    Attributes:
        original_length: up to it the short divisors hold.
        short, long: divisors, one for each of the rotated pairs.
        attention_factor: overrides the formula.
    """

    original_length: int = 4096
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float | None = None

    name: ClassVar[str] = "longrope"
    length_dependent: ClassVar[bool] = True

    def frequencies(self, base, width, lengths):
        """[batch, length, width/2]."""
        for name in ("short", "long"):
            if len(getattr(self, name)) != width // 2:
                raise ValueError(
                    f"longrope: {name} has {len(getattr(self, name))} numbers; allowed: "
                    f"{width // 2}, one for each rotated pair"
                )
        f = inverse_frequencies(base, width)
        short = jnp.asarray(f / np.asarray(self.short), jnp.float32)[None, None]
        long = jnp.asarray(f / np.asarray(self.long), jnp.float32)[None, None]
        factor = self.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return jnp.where((lengths > self.original_length)[..., None], long, short), factor


@register
@dataclasses.dataclass(frozen=True)
class Llama3(RopeScaling):
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, smooth between.

    Attributes:
        original_length: the trained context length.
        low_frequency_factor, high_frequency_factor: wavelengths above original/low are stretched
            fully, below original/high not at all.
    """

    original_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    name: ClassVar[str] = "llama3"

    def frequencies(self, base, width, lengths):
        """The smooth step between f / factor and f."""
        f = inverse_frequencies(base, width)
        turns = self.original_length * f / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * f / self.factor + smooth * f, 1.0
