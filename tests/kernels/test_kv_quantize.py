"""Quantization: the packing bit by bit, the kernels against their oracle, and the error's bound."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from kernels import kv_quantize
from kernels.kv_quantize import reference
from tests.kernels.aot import TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, RACES, random

BITS = [8, 4, 2]
# (kernel, oracle, back); of the last two one program each: of many, compiling takes the time.
KINDS = {
    "keys": (
        kv_quantize.quantize_keys,
        jax.jit(reference.quantize_keys, static_argnums=(1, 2)),
        jax.jit(kv_quantize.dequantize_keys, static_argnums=1),
    ),
    "values": (
        kv_quantize.quantize_values,
        jax.jit(reference.quantize_values, static_argnums=(1, 2)),
        jax.jit(kv_quantize.dequantize_values, static_argnums=1),
    ),
}


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_comes_back(bits):
    """All 256 bytes at each of a word's four places, by unpacking and packing."""
    byte = np.arange(256, dtype=np.uint32)
    words = np.concatenate([byte << (8 * place) for place in range(4)]).astype(np.int32)
    if bits == 8:
        words = byte.astype(np.int8)
    words = words.reshape(-1, 8, 1).repeat(2, 2)
    codes = np.asarray(jax.jit(kv_quantize.unpack, static_argnums=1)(words, bits))
    assert codes.min() >= 0
    assert codes.max() == 2**bits - 1
    packed = jax.jit(kv_quantize.pack, static_argnums=1)(codes, bits)
    np.testing.assert_array_equal(packed, words)


def test_the_layout_is_the_documented_one():
    codes = np.zeros((64, 1), np.int32)
    codes[16 * 2 + 2 * 3 + 1, 0] = 13
    words = np.asarray(jax.jit(kv_quantize.pack, static_argnums=1)(codes, 4))
    assert words.shape == (8, 1)
    assert words[3, 0] == 13 << (4 * 2 + 16)
    assert np.count_nonzero(words) == 1


def same(actual, expected):
    for part in ("codes", "affine"):
        a, b = (np.asarray(getattr(x, part)) for x in (actual, expected))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "H", "group"),
    [("bfloat16", 128, 32), pytest.param("float32", 64, 64, marks=pytest.mark.slow)],
)
def test_kernel_and_oracle_agree_bit_for_bit(kind, bits, dtype, H, group):
    kernel, oracle, _ = KINDS[kind]
    x = random(np.random.default_rng(0), 2, 5, 128, H, dtype=jnp.dtype(dtype))  # two steps
    run = jax.jit(functools.partial(kernel, bits=bits, group=group, interpret=INTERPRET))
    same(run(x), oracle(x, bits, group))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_at_most_half_a_step(kind, bits):
    """scale is at most (max − min)/levels, with bfloat16's 2**-7 for each of two roundings."""
    _, oracle, back = KINDS[kind]
    x = np.random.default_rng(0).normal(1, 3, (2, 2, 128, 128)).astype(np.float32)
    axis = 2 if kind == "keys" else 3
    error = np.asarray(back(oracle(x, bits, 128))) - x
    step = (x.max(axis) - x.min(axis)) / (2**bits - 1) * (1 + 2**-7)
    # The minimum is rounded down by at most 2**-7 of itself, which widens the range.
    step += np.abs(x.min(axis)) * 2**-7 / (2**bits - 1) * (1 + 2**-7)
    assert (np.abs(error).max(axis) <= step / 2 + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_group_is_exact(kind, bits):
    """Of numbers of bfloat16; as large as those above, of which the programs are."""
    _, oracle, back = KINDS[kind]
    numbers = np.array([0.0, -0.0, 1.5, -1.25, 3e30, -7e-30, 1.0, -2.0]).astype(jnp.bfloat16)
    for four in numbers.astype(np.float32).reshape(2, 2, 2, 1, 1):
        x = np.broadcast_to(four, (2, 2, 128, 128))
        np.testing.assert_array_equal(back(oracle(x, bits, 128)), x)


WRONG = [jnp.nan, jnp.inf, -jnp.inf, 3e38]


@pytest.mark.parametrize("bits", [4, *(pytest.param(b, marks=pytest.mark.slow) for b in (8, 2))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_has_no_scale_is_nan(kind, bits):
    """All of it, and no other group; by the kernel as by the oracle."""
    kernel, oracle, back = KINDS[kind]
    x = np.random.default_rng(0).normal(size=(1, 1, 128, 64)).astype(np.float32)
    for number, wrong in enumerate(WRONG):
        x[0, 0, 33 * number, 16 * number] = wrong
    kept = jax.jit(functools.partial(kernel, bits=bits, group=32, interpret=INTERPRET))(x)
    same(kept, oracle(x, bits, 32))
    axis = 2 if kind == "keys" else 3
    grouped = (1, 1, 4, 32, 64) if kind == "keys" else (1, 1, 128, 2, 32)
    fine = (np.abs(x) < 1e38).reshape(grouped).all(axis + 1, keepdims=True)
    actual = np.isfinite(back(kept)).reshape(grouped)
    assert (actual == fine).all()


def test_bytes():
    x = jnp.zeros((2, 5, 128, 128), jnp.bfloat16)
    for bits in BITS:
        q = KINDS["keys"][1](x, bits, 32)
        assert q.nbytes == 10 * (128 * 128 * bits // 8 + 4 * 128 * 128 // 32)


@pytest.mark.parametrize("kind", KINDS)
def test_no_races(kind):
    x = random(np.random.default_rng(0), 1, 2, 128, 128)
    jax.jit(functools.partial(KINDS[kind][0], bits=4, interpret=RACES))(x)
    assert not interpret_pallas_call.races.races_found


def test_errors_name_what_is_allowed():
    x = jnp.zeros((1, 1, 128, 128), jnp.bfloat16)
    for wrong, options, message in (
        (x, {"bits": 3}, "bits=3; allowed: 8, 4, 2"),
        (x, {"bits": 4, "group": 48}, "group=48; allowed: 16, 32"),
        (x[:, :, :100], {"bits": 4}, "T a multiple of 128"),
        (x[..., :80], {"bits": 4}, "H 64, 128 or 256"),
        (x.astype(jnp.float16), {"bits": 4}, "x.dtype=float16; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_quantize.quantize_keys(wrong, **options)
    for kind in ("keys", "values"):
        for wrong, group, message in (
            (x, 0, "group=0; allowed: 16, 32, 64, 128"),
            (x[:, :, :0], 64, r"x=\(1, 1, 0, 128\); allowed: \[B, K, T, H\], none 0"),
            (x[0, 0, 0, 0], 64, r"x=\(\); allowed: \[B, K, T, H\]"),
        ):
            with pytest.raises(ValueError, match=message):
                KINDS[kind][0](wrong, bits=4, group=group)
    with pytest.raises(ValueError, match="group=128; allowed: a divisor of x's H=64"):
        kv_quantize.quantize_values(x[..., :64], bits=4, group=128)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.sampled_from(BITS),
    st.sampled_from([16, 32, 64]),
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 99),
    st.floats(1e-3, 1e3),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([64, 128, 256]),
)
def test_anything(bits, group, kind, seed, size, dtype, H):
    kernel, oracle, _ = KINDS[kind]
    x = (random(np.random.default_rng(seed), 1, 1, 128, H) * size).astype(dtype)
    actual, expected = (
        kernel(x, bits=bits, group=group, interpret=INTERPRET),
        oracle(x, bits, group),
    )
    assert (actual.codes == expected.codes).all()
    assert (actual.affine == expected.affine).all()


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("bits", BITS)
def test_compiles(topology, bits):
    sizes = {"batch": 2, "tokens": 128, "heads": 8, "head_dim": 128, "bits": bits}
    compiles("kernel_programs_decode:kv_quantize", sizes, topology)
