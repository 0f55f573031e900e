"""What a GGUF file's metadata says of a model, and how it is rotated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxlm.interop.gguf_file import GGUFFile
from jaxlm.interop.hub_config import HubConfig

# Numbers that are at least 1.
COUNTS = (
    *("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "rope.dimension_count"),
)
# What the tensors' shapes show, or says nothing of the model.
SHOWN = {
    *("vocab_size", "feed_forward_length", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "rope.scaling.finetuned", "tensor_data_layout"),
}


class Header(HubConfig):
    """The metadata of a file's architecture, and its small tensors.

    Attributes:
        file: the file.

    Raises:
        ValueError: a size that is none, or more layers than the file can hold.
    """

    def __init__(self, file: GGUFFile, architecture: str):
        start = f"{architecture}."
        mine = {k.removeprefix(start): v for k, v in file.metadata.items() if k.startswith(start)}
        super().__init__(mine, file.name, file.shapes.keys())
        self.unread -= SHOWN
        self.file = file
        for key in COUNTS:
            value, most = mine.get(key, 1), len(file.shapes) if key == "block_count" else math.inf
            if not isinstance(value, int) or not 1 <= value <= most:
                allowed = "an integer >= 1, and a layer has a tensor"
                raise ValueError(f"{file.name}: {start}{key}={value!r}; allowed: {allowed}")

    def has(self, name: str) -> bool:
        """Whether the first layer has such a tensor."""
        return f"blk.0.{name}" in self.tensors

    @property
    def head_dim(self) -> int:
        """Said, or that of heads which share the width."""
        heads, width = self.require("attention.head_count"), self.require("embedding_length")
        return self.get("attention.key_length", width // heads)


def rope(header: Header, partial: bool = False) -> dict[str, Any]:
    """The share of a head that is rotated, and the scaling.

    Raises:
        ValueError: only a share, of what is not `partial`.
    """
    dims = header.get("rope.dimension_count", header.head_dim)
    if dims != header.head_dim and not partial:
        allowed = f"head_dim={header.head_dim}"
        raise ValueError(f"{header.name}: rope.dimension_count={dims}; allowed: {allowed}")
    share = {"partial_rotary_factor": dims / header.head_dim} if partial else {}
    scaling = rope_scaling(header)
    return share | ({"rope_scaling": scaling} if scaling else {})


def rope_scaling(header: Header) -> dict[str, Any]:
    """config.json's rope_scaling; empty: there is none.

    Raises:
        ValueError: divisors that no formula gives, or one of two lists of them.
    """
    given = {
        theirs: header.get(f"rope.scaling.{ours}")
        for ours, theirs in {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
            "yarn_attn_factor": "attention_factor",
        }.items()
    }
    given = {k: v for k, v in given.items() if v is not None}
    kind = header.get("rope.scaling.type", "none")
    if "rope_factors_long.weight" in header.tensors:
        header.get("rope.scaling.attn_factor")  # which follows from the lengths
        lists = {f"{n}_factor": _numbers(header, f"rope_factors_{n}") for n in ("short", "long")}
        return {"rope_type": "longrope", **given, **lists}
    if "rope_freqs.weight" in header.tensors:
        return llama3(header)
    return {} if kind == "none" else {"rope_type": kind, **given}


def _numbers(header: Header, name: str) -> list[float]:
    """A small tensor; float32 as the shortest decimals."""
    if f"{name}.weight" not in header.tensors:
        raise ValueError(f"{header.name}: no tensor {name}.weight; allowed: both lists of divisors")
    return [float(str(x)) for x in header.file.read(f"{name}.weight").astype(np.float32)]


def llama3(header: Header) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a file keeps only what it divides each frequency by.

    The slowest pairs are divided by the factor; those between say for how long a context, with the
    formula's two bounds as in all of these models.
    """
    divisors = np.asarray(_numbers(header, "rope_freqs"))
    wrong = f"{header.name}: rope_freqs.weight; allowed: the divisors of Llama 3.1"
    if not divisors.size or not np.isfinite(divisors).all() or np.min(divisors) < 1:
        raise ValueError(wrong)
    low, high, factor = 1.0, 4.0, float(np.max(divisors))
    if factor == 1:
        return {}
    base, pairs = header.get("rope.freq_base", 10000.0, float), len(divisors)
    waves = 2 * math.pi * base ** (np.arange(pairs) / pairs)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    lengths = waves * (low + smooth * (high - low))
    length = round(float(np.median(lengths[between]))) if between.any() else 8192
    found = np.clip((length / waves - low) / (high - low), 0, 1)
    if not np.allclose(found, smooth, rtol=0, atol=1e-4):  # float32 in both, and a rounded length
        raise ValueError(wrong)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": length,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def layer_types(header: Header, period: int) -> dict[str, Any]:
    """Which layers slide: as a list says, or all but each last of so many."""
    pattern = header.get("attention.sliding_window_pattern", period, int | list)
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(header.require("block_count"))]
    return {"layer_types": ["sliding_attention" if p else "full_attention" for p in pattern]}
