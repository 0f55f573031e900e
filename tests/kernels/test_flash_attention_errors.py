"""Calls that flash attention refuses, each in one line: a field, its value, what is allowed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.attention import mask as masks
from kernels.flash_attention import At, Sinks, flash_attention, flash_attention_at
from kernels.flash_attention.blocks import Blocks, choose_blocks
from tests.kernels.test_flash_attention import SMALL, fire_of

LONG = Blocks(256, 256, 128, 128, 256)
FIRE = fire_of(jnp.ones((1, 128)), 2)
SHAPES = "allowed: [batch, heads, length, head_dim] and twice [batch, kv_heads, length, head_dim]"


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def at(length, dtype=jnp.int32):
    return At(*[zeros(1, length, dtype=dtype)] * 2)


SINKS = {"sinks": Sinks(4), "window": 128}
# By the start of what it says: what is not as in a call that is right.
ARRAYS = {
    f"q, k, v of shapes (2, 128, 64), (1, 1, 128, 64), (1, 1, 128, 64); {SHAPES}": {
        "q": zeros(2, 128, 64)
    },
    f"q, k, v of shapes (1, 3, 128, 64), (1, 2, 128, 64), (1, 2, 128, 64); {SHAPES}": {
        "q": zeros(1, 3, 128, 64),
        "k": zeros(1, 2, 128, 64),
        "v": zeros(1, 2, 128, 64),
    },
    "q, k, v of shapes (1, 0, 128, 64)": {"q": zeros(1, 0, 128, 64)},
    "q, k, v of shapes (0, 2, 128, 64)": {"q": zeros(0, 2, 128, 64)},
    "q, k, v of shapes (1, 2, 128, 64), (1, 0, 128, 64)": {
        "k": zeros(1, 0, 128, 64),
        "v": zeros(1, 0, 128, 64),
    },
    "head_dim=72; allowed: 64, 80, 96, 128, 192, 256": {
        name: zeros(1, 1, 128, 72) for name in "qkv"
    },
    "dtypes float16, float32, float32; allowed: all bfloat16 or all float32": {
        "q": zeros(1, 2, 128, 64, dtype=jnp.float16)
    },
}
OPTIONS = {
    "q, k, v of shapes (1, 2, 0, 64)": {
        "q": zeros(1, 2, 0, 64),
        "k": zeros(1, 1, 0, 64),
        "v": zeros(1, 1, 0, 64),
    },
    "q, k, v of shapes (1, 2, 64, 64)": {"q": zeros(1, 2, 64, 64)},
    "scale=nan; allowed: a finite Python number": {"scale": float("nan")},
    "scale=Array(1., dtype=float32); allowed: a finite Python number": {"scale": jnp.float32(1)},
    "softcap=0.0; allowed: None or a finite Python number > 0": {"softcap": 0.0},
    "softcap=-1.0; allowed: None or a finite Python number > 0": {"softcap": -1.0},
    "ahead=-1; allowed: None or an integer from 0 to 2147483647": {"ahead": -1},
    "window=0; allowed: None or an integer from 1 to 2147483647": {"window": 0},
    "window=2147483648; allowed: None or an integer from 1 to": {"window": 2**31},
    "window=1.5; allowed: None or an integer from 1 to 2147483647": {"window": 1.5},
    "prefix=1.5; allowed: None or an integer from 0 to 2147483647": {"prefix": 1.5},
    "prefix=-1; allowed: None or an integer from 0 to 2147483647": {"prefix": -1},
    "prefix=3 with ahead=0, window=200; allowed: ahead=0 and no window": {
        "prefix": 3,
        "window": 200,
    },
    "segment_ids: int32 of shape (1, 5); allowed: int32 of shape (1, 128)": {
        "segment_ids": zeros(1, 5, dtype=jnp.int32)
    },
    "segment_ids: float32 of shape (1, 128); allowed: int32": {"segment_ids": zeros(1, 128)},
    "positions: int32 of shape (5,); allowed: int32 of shape (1, 128)": {
        "positions": zeros(5, dtype=jnp.int32)
    },
    "bias: float32 of shape (2, 5); allowed: floating point of shape (2, 255)": {
        "bias": zeros(2, 5)
    },
    "bias: int32 of shape (2, 255); allowed: floating point": {
        "bias": zeros(2, 255, dtype=jnp.int32)
    },
    "factor: float32 of shape (255,); allowed: floating point of shape (2, 255)": {
        "factor": zeros(255)
    },
    "fire.w_out: float32 of shape (3, 12); allowed: floating point of shape (2, 12)": {
        "fire": fire_of(jnp.ones((1, 128)), 3)
    },
    "fire.reciprocal: float32 of shape (1, 5); allowed: floating point of shape (1, 128)": {
        "fire": FIRE._replace(reciprocal=jnp.ones((1, 5)))
    },
    "fire with sinks; allowed: one of them": {"fire": FIRE, **SINKS},
    "sinks with window=100, ahead=0; allowed: a window of at least 128": {
        "sinks": Sinks(4),
        "window": 100,
    },
    "sinks.num=0; allowed: an integer from 1 to the window's 128": {**SINKS, "sinks": Sinks(0)},
    "sinks.num=1.5; allowed: an integer": {**SINKS, "sinks": Sinks(1.5)},
    "sinks.bias: float32 of shape (3,); allowed: floating point of shape (2,)": {
        **SINKS,
        "sinks": Sinks(4, bias=zeros(3)),
    },
    "sinks.q of bfloat16; allowed: float32, as q": {
        **SINKS,
        "sinks": Sinks(4, q=zeros(1, 2, 128, 64, dtype=jnp.bfloat16)),
    },
    "first_query: int32 of shape (1,); allowed: int32 of shape ()": {
        "first_query": zeros(1, dtype=jnp.int32)
    },
    "first_query: float32 of shape (); allowed: int32 of shape ()": {"first_query": zeros()},
    "first_query with 100 queries of 128 tokens; allowed: a multiple of 128": {
        "q": zeros(1, 2, 100, 64),
        "first_query": jnp.int32(0),
    },
    "first_query with 256 queries of 128 tokens; allowed: a multiple of 128": {
        "q": zeros(1, 2, 256, 64),
        "first_query": jnp.int32(0),
    },
    "first_query with 128 queries in blocks of 256; allowed: whole ones": {
        "first_query": jnp.int32(0),
        "blocks": (LONG, LONG),
    },
    "chip='v7'; allowed: v4, v5e, v5p, v6e, tpu7x; None on a TPU": {"chip": "v7"},
    "chip=None; allowed: v4, v5e, v5p, v6e, tpu7x; None on a TPU": {"chip": None},
    "blocks=(Blocks(block_q=128,": {"blocks": (SMALL,)},
    "blocks of 256 queries with sinks; allowed: no more than the window's 128": {
        **SINKS,
        "blocks": (SMALL, LONG),
    },
}
PLACES = {
    "q_at.positions: int32 of shape (1, 5); allowed: int32 of shape (1, 128)": {"q_at": at(5)},
    "k_at.positions: float32 of shape (1, 128); allowed: int32": {"k_at": at(128, jnp.float32)},
    "slopes: float32 of shape (3,); allowed: floating point of shape (2,)": {"slopes": zeros(3)},
    "mask=None; allowed: what has visible, touches and covers": {"mask": None},
    "ceiling=-1; allowed: None or an integer from 0 to 2147483647": {"ceiling": -1},
    "scale=inf; allowed: a finite Python number": {"scale": float("inf")},
    "chip='v7'; allowed: v4": {"chip": "v7"},
    "q, k, v of shapes (1, 2, 128, 64), (1, 1, 0, 64)": {
        "k": zeros(1, 1, 0, 64),
        "v": zeros(1, 1, 0, 64),
        "k_at": at(0),
    },
}


def right():
    q, k = zeros(1, 2, 128, 64), zeros(1, 1, 128, 64)
    return {"q": q, "k": k, "v": k, "scale": 1.0, "chip": "v5e"}


@pytest.mark.parametrize("message", [*ARRAYS, *OPTIONS])
def test_calls_that_are_wrong(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        flash_attention(**{**right(), **{**ARRAYS, **OPTIONS}[message]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [*ARRAYS, *PLACES])
def test_calls_by_positions_that_are_wrong(message):
    change = {**ARRAYS, **PLACES}[message]
    call = {**right(), "q_at": at(128), "k_at": at(128), "mask": masks.causal(), **change}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        flash_attention_at(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((128, 256, 128, 128, 512), "block_q=128; allowed: a multiple of 256"),
        ((256, 256, 100, 128, 512), "tile_q=100; allowed: a multiple of 128"),
        ((256, 256, 128, 0, 512), "tile_k=0; allowed: a multiple of 128"),
        ((256, 128, 128, 256, 512), "block_k=128; allowed: a multiple of 256"),
        ((384, 128, 256, 128, 512), "block_q=384; allowed: a multiple of 256"),
        ((256, 256, 128, 128, 384), "stretch=384; allowed: a multiple of 256"),
        ((256.0, 256, 128, 128, 512), "block_q=256.0; allowed: a multiple of 128"),
        ((256, 256, 128, 128, 512, 0), "vmem_bytes=0; allowed: a multiple of 1"),
        ((256, 256, 128, 128, 512, 1, -1), "early=-1; allowed: an integer >= 0"),
    ],
)
def test_blocks_that_are_none(sizes, message):
    with pytest.raises(ValueError, match=f"^Blocks: {message}$"):
        Blocks(*sizes)


def test_an_unknown_chip():
    with pytest.raises(ValueError, match="chip='v9'; allowed: v4, v5e, v5p, v6e, tpu7x"):
        choose_blocks(128, "v9", 256)


def test_numbers_of_numpy_are_numbers():
    options = {"scale": np.float32(0.5), "window": np.int64(5), "softcap": np.float64(2.0)}
    call = {**right(), **options}
    arrays = [call.pop(name) for name in "qkv"]
    found = jax.eval_shape(lambda q, k, v: flash_attention(q, k, v, **call), *arrays)
    assert found[0].shape == arrays[0].shape
