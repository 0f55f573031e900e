"""The cross entropy kernel in TPU interpret mode against all logits at once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.cross_entropy import Blocks, cross_entropy, reference
from kernels.cross_entropy.blocks import VMEM_BYTES, choose_blocks
from kernels.cross_entropy.layout import entries, lies_transposed
from launch.aot import traffic
from tests.kernels.aot import TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import random

MODE = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
SMALL = Blocks(16, 128, 8)
# Of the largest value of an array. float32: sums of 200 and 64 terms in another order. bfloat16:
# gradients are rounded to 8 bits, as are probabilities before their matrix product; losses aren't.
LOSSES = {jnp.float32: 2e-6, jnp.bfloat16: 2e-6}
GRADIENTS = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}


def problem(dtype, vocab_axis, tokens=24, width=None, vocab=200):
    # So that the kernels see the matrix as it is given: see `lies_transposed`.
    width = width or (64 if vocab_axis == 1 else 128)
    rng = np.random.default_rng(0)
    shape = (width, vocab) if vocab_axis == 1 else (vocab, width)
    hidden = random(rng, tokens, width, dtype=dtype)
    matrix = jnp.asarray(0.3 * rng.normal(size=shape), dtype)
    bias = random(rng, vocab)
    # Some are none: below 0, past the vocabulary, and past its last block.
    targets = rng.integers(0, vocab, tokens, dtype=np.int32)
    targets[:3] = np.array([-1, vocab, 2**31 - 1])[:tokens]
    cotangents = random(rng, tokens), random(rng, tokens)
    return (hidden, matrix, bias), jnp.asarray(targets), cotangents


def with_gradients(function, arguments, targets, cotangents, mode=MODE):
    def total(*arguments):
        nll, lse, correct = function(*arguments, targets)
        return (cotangents[0] * nll + cotangents[1] * lse).sum(), (nll, lse, correct)

    with pltpu.force_tpu_interpret_mode(mode):
        gradients, losses = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arguments)
    return losses, gradients


def near(found, wanted, tolerance):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    a, b = (np.asarray(x, np.float32) for x in (found, wanted))
    # What is small is a difference of numbers of order 1.
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1))


# Two in every run, the others with -m slow: four seconds each.
@pytest.mark.parametrize(
    ("dtype", "vocab_axis", "softcap"),
    [
        (jnp.float32, 1, 3.0),
        (jnp.bfloat16, 0, None),
        pytest.param(jnp.float32, 0, None, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 0, 3.0, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 1, None, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 0, 3.0, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 1, None, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 1, 3.0, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_the_reference(dtype, vocab_axis, softcap):
    agree(dtype, vocab_axis, softcap, SMALL)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    vocab_axis=st.sampled_from([0, 1]),
    softcap=st.none() | st.floats(1, 30),
    blocks=st.sampled_from([SMALL, Blocks(32, 256, 16), None]),
    tokens=st.integers(1, 70),
    width=st.integers(1, 300),
    vocab=st.integers(1, 600),
)
def test_many_drawn_cases(dtype, vocab_axis, softcap, blocks, tokens, width, vocab):
    agree(dtype, vocab_axis, softcap, blocks, tokens=tokens, width=width, vocab=vocab)


def agree(dtype, vocab_axis, softcap, blocks, **sizes):
    """Losses and all gradients."""
    drawn = problem(dtype, vocab_axis, **sizes)
    static = {"vocab_axis": vocab_axis, "softcap": softcap}
    ours = functools.partial(cross_entropy, **static, blocks=blocks)
    losses, gradients = with_gradients(ours, *drawn)
    plain = functools.partial(reference.cross_entropy, **static)
    wanted_losses, wanted_gradients = with_gradients(plain, *drawn)
    for found, wanted in zip(losses[:2], wanted_losses[:2], strict=True):
        near(found, wanted, LOSSES[dtype])
    np.testing.assert_array_equal(losses[2], wanted_losses[2])
    for found, wanted in zip(gradients, wanted_gradients, strict=True):
        near(found, wanted, GRADIENTS[dtype])


@pytest.mark.slow
def test_the_target_that_is_almost_certain_keeps_its_gradient():
    (hidden, matrix, bias), targets, _ = problem(jnp.float32, 1)
    bias = jnp.zeros_like(bias).at[7].set(40.0)
    targets, g = jnp.full_like(targets, 7), (jnp.ones(24), jnp.zeros(24))
    given = ((0.1 * hidden, matrix, bias), targets, g)
    ours = functools.partial(cross_entropy, vocab_axis=1, blocks=SMALL)
    plain = functools.partial(reference.cross_entropy, vocab_axis=1)
    # float32 has 1e-7 of p = 1 in 1 - p; the reference loses as much.
    (_, _, correct), (found, *_) = with_gradients(ours, *given)
    _, (wanted, *_) = with_gradients(plain, *given)
    assert correct.all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_no_races(capfd):
    """Two cores share the grid's parallel axis, as on v4, v5p and tpu7x."""
    given = problem(jnp.float32, 1, tokens=16, vocab=200)
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    ours = functools.partial(cross_entropy, vocab_axis=1, blocks=Blocks(8, 128, 8))
    with_gradients(ours, *given, mode)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_axis": 2}, r"vocab_axis=2; allowed: 1 .* 0 for \[V, D\]"),
        ({"vocab_axis": 0}, r"matrix=\(64, 200\); allowed: \[V, D\] with D=64"),
        ({"hidden": jnp.zeros((4, 64), jnp.float16)}, "hidden.dtype=float16; allowed: bfloat16"),
        ({"hidden": jnp.zeros((2, 4, 64))}, r"hidden=\(2, 4, 64\); allowed: \[M, D\]"),
        ({"hidden": jnp.zeros((24, 64), jnp.bfloat16)}, "matrix.dtype=float32; allowed: hidden's"),
        ({"targets": jnp.zeros(3, jnp.int32)}, r"targets=int32\(3,\); allowed: int32 \(24,\)"),
        ({"bias": jnp.zeros(3)}, r"bias=float32\(3,\); allowed: float \(200,\)"),
        ({"matrix": jnp.zeros((64, 0))}, r"matrix=\(64, 0\); allowed: \[D, V\] with D=64, V ≥ 1"),
        ({"softcap": 0.0}, "softcap=0.0; allowed: None or a finite number > 0"),
        ({"softcap": math.inf}, "softcap=inf; allowed: None or a finite number > 0"),
        ({"blocks": Blocks(16, 128, 12)}, "blocks=.*; allowed: rows that are a multiple of tile"),
        ({"chip": "v9"}, "chip='v9'; allowed: v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    (hidden, matrix, bias), targets, _ = problem(jnp.float32, 1)
    arguments = {"hidden": hidden, "matrix": matrix, "bias": bias, "targets": targets}
    with pytest.raises(ValueError, match=text):
        cross_entropy(**{**arguments, "vocab_axis": 1, **change})


@pytest.mark.parametrize(
    ("shape", "transposed"),
    [
        ((4096, 32768), False),
        ((4096, 50257), True),
        ((50257, 768), False),
        ((64, 200), False),
        ((200, 64), True),
        ((128, 200), True),
    ],
)
def test_how_a_matrix_lies(shape, transposed):
    """As in the layouts that libtpu gives arguments of these shapes."""
    assert lies_transposed(*shape) is transposed


@pytest.mark.parametrize("width", [1, 128, 200])
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_the_targets_entries(width, vocab_axis):
    """The widest is taken in two steps, of which the second overlaps the first."""
    rows = jnp.arange(7 * width).reshape(7, width)
    ids = jnp.array([6, 0, 3, 3])
    found = entries(rows.T if vocab_axis == 1 else rows, ids, vocab_axis)
    np.testing.assert_array_equal(found, rows[ids])


@pytest.mark.parametrize("chip", VMEM_BYTES)
@pytest.mark.parametrize("width", [64, 768, 4096, 5120])
@pytest.mark.parametrize("tokens", [1, 200, 8192])
def test_sizes_of_blocks(chip, width, tokens):
    b = choose_blocks(tokens, width, 50257, 2, chip)
    assert b.rows % b.tile == b.tile % 128 == b.vocab % 128 == 0
    assert b.rows < tokens + 128


def test_states_that_are_too_wide():
    with pytest.raises(ValueError, match="width D=8192; allowed: at most 5760 on v4 at 2 bytes"):
        choose_blocks(128, 8192, 512, 2, "v4")


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("vocab", "backward"), [(128256, False), (128256, True), (50257, True)])
def test_it_compiles_for_every_generation_and_copies_no_matrix(topology, vocab, backward):
    """A copy as large as the matrix would lie where a gradient will: it is no temporary memory."""
    sizes = {"tokens": 8192, "width": 4096, "vocab_blocks": vocab / 512, "backward": backward}
    memory, module = compiles("kernel_programs_training:cross_entropy", sizes, topology)
    assert memory.temporaries < 8 * 2**20
    large = {
        i.opcode
        for name, i in module.instructions()
        if sum(array.nbytes for array in i.results) >= 2 * 4096 * vocab
        and not i.is_mosaic
        and name not in module.fused
    }
    assert large <= traffic.FREE
