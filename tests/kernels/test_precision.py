"""How exactly float32 is multiplied. Interpret mode on a CPU does it in full whatever is asked for:
these look at what the compiler is told.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels.block_sampled_attention import Sample, block_sampled_attention
from kernels.cross_entropy import Blocks, cross_entropy
from kernels.decode_attention import Queries, Scoring, Slots, decode_attention
from kernels.flash_attention import Sinks, flash_attention
from kernels.kv_quantize.reference import quantize_keys, quantize_values
from kernels.precision import precision_of
from kernels.quantized_decode_attention import Zone, quantized_decode_attention
from launch.aot.static_cost import measure
from tests.kernels.aot import needs_libtpu
from tests.kernels.test_flash_attention import SMALL


def attend(x):
    options = {"window": 128, "sinks": Sinks(4), "chip": "v5e", "blocks": (SMALL, SMALL)}
    return flash_attention(x, x, x, scale=1.0, **options)[0]


def sampled(x):
    sample = Sample(jnp.ones(1, jnp.int32), jnp.zeros(1), 2)
    return block_sampled_attention(x, x, x, sample, scale=1.0, block=128, sink_blocks=1)[0]


def entropy(x):
    targets = jnp.zeros(256, jnp.int32)
    blocks = Blocks(128, 128, 128)
    return cross_entropy(x[0, 0], x[0, 0].T, None, targets, vocab_axis=1, blocks=blocks).nll


TRAINED = {"flash_attention": attend, "block_sampled": sampled, "cross_entropy": entropy}


def decode(x):
    queries, slots = (jnp.zeros((1, n), jnp.int32) for n in (1, 256))
    found = decode_attention(x[:, :, :1], x, x, Scoring(1.0), Queries(queries), Slots(slots))
    numbers = x.reshape(1, 1, 256, 64)
    kept = quantize_keys(numbers, 4, 64), quantize_values(numbers, 4, 64)
    zones = [Zone(*kept, Slots(slots)), Zone(x, x, Slots(slots))]
    return found, quantized_decode_attention(x[:, :, :1], zones, Scoring(1.0), Queries(queries))


def precisions(function, dtype, at_least):
    """Of all products in the program, which are those of kernels."""
    text = str(jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1, 1, 256, 64), dtype)))
    said = re.findall(r"precision=([^\n]*)", text)
    assert len(said) == text.count("dot_general[") >= at_least
    return set(said)


def gradient(function):
    return jax.grad(lambda x: function(x).sum())


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_all_passes_follow_what_the_forward_pass_is_asked(name, recomputed):
    function = TRAINED[name]

    def forward_asks(x):
        with jax.default_matmul_precision("highest"):
            out, back = jax.vjp(function, x)
        return back(out)  # traced after the context

    number = 4 if name == "cross_entropy" else 9
    run = gradient(jax.checkpoint(function) if recomputed else function)
    (default,) = precisions(run, jnp.float32, number)
    with jax.default_matmul_precision("highest"):
        (highest,) = precisions(run, jnp.float32, number)
    assert "DEFAULT" in default and "HIGHEST" in highest
    if not recomputed:
        assert precisions(forward_asks, jnp.float32, number) == {highest}


@pytest.mark.parametrize("asked", ["high", "highest"])
@pytest.mark.parametrize("name", [*TRAINED, "decode"])
def test_bfloat16_is_multiplied_once_whatever_is_asked(name, asked):
    """Mosaic refuses bfloat16 with more, and "high" at all."""
    run = decode if name == "decode" else gradient(TRAINED[name])
    with jax.default_matmul_precision(asked):
        (once,) = precisions(run, jnp.bfloat16, 4)
        (full,) = precisions(run, jnp.float32, 4)
    assert "DEFAULT" in once and "HIGHEST" in full


@pytest.mark.parametrize(
    ("asked", "exact"),
    [(None, False), ("bfloat16", False), ("high", True), ("float32", True), ("highest", True)],
)
def test_what_may_be_asked(asked, exact):
    with jax.default_matmul_precision(asked):
        assert precision_of(jnp.dtype(jnp.bfloat16)) == jax.lax.Precision.DEFAULT
        exactly = precision_of(jnp.dtype(jnp.float32)) == jax.lax.Precision.HIGHEST
    assert exactly == exact


ATTENTION = {"length": 1024, "heads": 1, "head_dim": 128, "backward": True}
CACHE = {"batch": 1, "capacity": 512, "heads": 1, "head_dim": 128}
PROGRAMS = {
    "attention:flash_attention": ATTENTION,
    "attention:block_sampled_attention": ATTENTION,
    "training:cross_entropy": {"tokens": 512, "width": 512, "vocab_blocks": 1, "backward": True},
    "decode:decode_attention": CACHE,
    "decode:quantized_decode_attention": {**CACHE, "bits": 4},
}
TRAINING = list(PROGRAMS)[:3]


def bundles(program, sizes):
    cost = measure(f"launch.kernel_programs_{program}", sizes, "v5e:2x2", profile_too=False)
    assert cost.error is None
    return cost.bundles


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("program", TRAINING)
def test_the_compiler_multiplies_more_where_more_is_asked(program, monkeypatch):
    """Six products of bfloat16 parts for one: in bundles, forward and backward."""
    found = {}
    for asked in ("default", "high"):
        monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", asked)
        found[asked] = bundles(program, {**PROGRAMS[program], "dtype": "float32"})
    assert found["high"] > 2 * found["default"]


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_bfloat16_compiles_where_more_is_asked(program, monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    assert bundles(program, PROGRAMS[program]) > 0
