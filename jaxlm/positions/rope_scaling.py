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

from jaxlm.config import fits
from jaxlm.positions.encoding import LARGE, MAX_POSITION, require
from jaxlm.positions.registry import register

# No context grows further, and powers of it stay finite.
MAX_FACTOR = 1e6


def inverse_frequencies(base: float, width: int) -> np.ndarray:
    """base^(-2i/width), i = 0 … width/2 - 1, float64."""
    return base ** (-np.arange(0, width, 2) / width)


def require_attention_factor(owner: str, factor: float | None) -> None:
    """Raises ValueError unless it is a factor on cos and sin, or None for the formula's."""
    fine = factor is None or 0 < factor <= LARGE
    require(fine, f"{owner}: attention_factor", factor, "None or a number > 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The base.

    A length-dependent scaling rotates all keys for the context's present length, whenever they were
    cached. What deeper layers computed while the context was shorter stays as it was.

    Attributes:
        factor: what the context grows by.
    """

    factor: float

    name: ClassVar[str] = ""
    length_dependent: ClassVar[bool] = False

    def __post_init__(self):
        fine = 1 <= self.factor <= MAX_FACTOR
        require(fine, f"{self.name}: factor", self.factor, f"a number in [1, {MAX_FACTOR:g}]")

    def check(self, width: int) -> None:
        """Raises ValueError if `width` rotated dims cannot be scaled."""

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


@dataclasses.dataclass(frozen=True)
class TrainedLengthScaling(RopeScaling):
    """The base of scalings that depend on where training ended.

    Attributes:
        original_length: the trained context length, in tokens.
    """

    original_length: int

    def __post_init__(self):
        super().__post_init__()
        fine = 2 <= self.original_length <= MAX_POSITION
        allowed = "the trained context length, an integer >= 2"
        require(fine, f"{self.name}: original_length", self.original_length, allowed)


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

    def check(self, width):
        """The exponent d/(d - 2) needs more than one pair."""
        require(width > 2, f"{self.name}: rotated dims", width, "an even number >= 4")

    def frequencies(self, base, width, lengths):
        """Frequencies of the larger base."""
        return inverse_frequencies(base * self.factor ** (width / (width - 2)), width), 1.0


@register
@dataclasses.dataclass(frozen=True)
class DynamicNTK(TrainedLengthScaling):
    """NTK-aware with the factor taken from the context's length; unchanged up to the trained one.

    base·(factor·n/L - (factor - 1))^(d/(d-2)) with n = max(length, L), as Hugging Face computes
    it; the length is each document's own, not the batch's, so that none depends on its neighbours.
    """

    name: ClassVar[str] = "dynamic_ntk"
    length_dependent: ClassVar[bool] = True

    def check(self, width):
        """The exponent d/(d - 2) needs more than one pair."""
        require(width > 2, f"{self.name}: rotated dims", width, "an even number >= 4")

    def frequencies(self, base, width, lengths):
        """[batch, length, width/2]."""
        n = jnp.maximum(lengths, self.original_length).astype(jnp.float32)[..., None]
        stretch = self.factor * n / self.original_length - (self.factor - 1)
        power = jnp.asarray(np.arange(0, width, 2) / (width - 2), jnp.float32)[None, None]
        fixed = jnp.asarray(inverse_frequencies(base, width), jnp.float32)[None, None]
        return fixed * stretch ** (-power), 1.0


@register
@dataclasses.dataclass(frozen=True)
class YaRN(TrainedLengthScaling):
    """YaRN: fast pairs kept, slow ones interpolated, a ramp between (Peng et al. 2023, section 3).

    Attributes:
        beta_fast, beta_slow: turns over the trained context at the ends of the ramp.
        attention_factor: on cos and sin; None: 0.1·ln(factor) + 1 (equation 22).
        truncate: the ramp's ends are rounded outwards to whole pairs; False: not (gpt-oss).
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    name: ClassVar[str] = "yarn"

    def __post_init__(self):
        super().__post_init__()
        slow, fast = self.beta_slow, self.beta_fast
        require(1 / LARGE <= slow <= LARGE, "yarn: beta_slow", slow, "a number > 0")
        require(slow <= fast <= LARGE, "yarn: beta_fast", fast, f"a number >= beta_slow={slow}")
        require_attention_factor(self.name, self.attention_factor)

    def frequencies(self, base, width, lengths):
        """The ramp between f and f / factor."""

        def pair_of(turns: float) -> float:
            ratio = self.original_length / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(base))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        f = inverse_frequencies(base, width)
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1
        return f * (1 - ramp) + f / self.factor * ramp, factor


@register
@dataclasses.dataclass(frozen=True)
class LongRoPE(TrainedLengthScaling):
    """LongRoPE: a searched divisor per pair, one set for short and one for long contexts.

    (Ding et al. 2024.) The factor on cos and sin is √(1 + ln factor / ln original_length).

    Attributes:
        short, long: divisors, one for each of the rotated pairs; the short ones hold up to
            original_length.
        attention_factor: overrides the formula.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float | None = None

    name: ClassVar[str] = "longrope"
    length_dependent: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        for name, divisors in (("short", self.short), ("long", self.long)):
            fine = all(fits(d, float) and 1 / MAX_FACTOR <= d <= MAX_FACTOR for d in divisors)
            allowed = f"numbers in [{1 / MAX_FACTOR:g}, {MAX_FACTOR:g}]"
            require(fine, f"longrope: {name}", divisors, allowed)
        require_attention_factor(self.name, self.attention_factor)

    def check(self, width):
        """A divisor for each pair."""
        for name, divisors in (("short", self.short), ("long", self.long)):
            if len(divisors) != width // 2:
                raise ValueError(
                    f"longrope: {name} has {len(divisors)} numbers; allowed: "
                    f"{width // 2}, one for each rotated pair"
                )

    def frequencies(self, base, width, lengths):
        """[batch, length, width/2]."""
        f = inverse_frequencies(base, width)
        short = jnp.asarray(f / np.asarray(self.short), jnp.float32)[None, None]
        long = jnp.asarray(f / np.asarray(self.long), jnp.float32)[None, None]
        factor = self.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return jnp.where((lengths > self.original_length)[..., None], long, short), factor


@register
@dataclasses.dataclass(frozen=True)
class Llama3(TrainedLengthScaling):
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, smooth between.

    Attributes:
        low_frequency_factor, high_frequency_factor: wavelengths above original/low are stretched
            fully, below original/high not at all.
    """

    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    name: ClassVar[str] = "llama3"

    def __post_init__(self):
        super().__post_init__()
        low, high = self.low_frequency_factor, self.high_frequency_factor
        require(0 < low <= LARGE, "llama3: low_frequency_factor", low, "a number > 0")
        allowed = f"a number > low_frequency_factor={low}"
        require(low < high <= LARGE, "llama3: high_frequency_factor", high, allowed)

    def frequencies(self, base, width, lengths):
        """The smooth step between f / factor and f."""
        f = inverse_frequencies(base, width)
        turns = self.original_length * f / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * f / self.factor + smooth * f, 1.0
