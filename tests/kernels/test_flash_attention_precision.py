"""How exactly float32 is multiplied. Interpret mode on a CPU does it in full whatever is asked for:
these look at what the compiler is told.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels.flash_attention import Sinks, flash_attention
from kernels.flash_attention.precision import precision_of
from launch.aot.static_cost import measure
from tests.kernels.aot import needs_libtpu
from tests.kernels.test_flash_attention import SMALL

X = jax.ShapeDtypeStruct((1, 1, 256, 64), jnp.float32)


def attend(q, k, v):
    options = {"window": 128, "sinks": Sinks(4), "chip": "v5e", "blocks": (SMALL, SMALL)}
    return flash_attention(q, k, v, scale=1.0, **options)[0]


def precisions(function):
    """Of all products in the program, which are those of kernels."""
    text = str(jax.make_jaxpr(function)(X, X, X))
    said = re.findall(r"precision=([^\n]*)", text)
    assert len(said) == text.count("dot_general[") > 9  # one that says none has what is set by then
    return set(said)


def forward_asks(q, k, v):
    with jax.default_matmul_precision("highest"):
        out, back = jax.vjp(attend, q, k, v)
    return back(out)  # traced after the context


@pytest.mark.parametrize("recomputed", [False, True])
def test_all_passes_follow_what_the_forward_pass_is_asked(recomputed):
    function = jax.checkpoint(attend) if recomputed else attend

    def gradients(q, k, v):
        return jax.grad(lambda *x: function(*x).sum(), (0, 1, 2))(q, k, v)

    (default,) = precisions(gradients)
    with jax.default_matmul_precision("highest"):
        (highest,) = precisions(gradients)
    assert "DEFAULT" in default and "HIGHEST" in highest
    if not recomputed:
        (after,) = precisions(forward_asks)
        assert after == highest


@pytest.mark.parametrize(
    ("asked", "exact"),
    [(None, False), ("bfloat16", False), ("high", True), ("float32", True), ("highest", True)],
)
def test_what_may_be_asked(asked, exact):
    with jax.default_matmul_precision(asked):
        assert precision_of(jnp.dtype(jnp.bfloat16)) == jax.lax.Precision.DEFAULT
        exactly = precision_of(jnp.dtype(jnp.float32)) == jax.lax.Precision.HIGHEST
    assert exactly == exact


@pytest.mark.tpu_aot
@needs_libtpu
def test_the_compiler_multiplies_more_where_more_is_asked(monkeypatch):
    """Six products of bfloat16 parts for one: in bundles, forward and backward."""
    sizes = {"length": 1024, "heads": 1, "head_dim": 128, "dtype": "float32", "backward": True}
    found = {}
    for asked in ("default", "highest"):
        monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", asked)
        function = "launch.kernel_programs_attention:flash_attention"
        cost = measure(function, sizes, "v5e:2x2", profile_too=False)
        assert cost.error is None
        found[asked] = cost.bundles
    assert found["highest"] > 2 * found["default"]
