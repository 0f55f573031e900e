"""How large the program is, and how often it is made: counts, not stopwatches."""

import functools
import re

import jax
import pytest

from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from tests.model.configs import PATTERN, small
from tests.model.test_precision import loss_and_gradients

WINDOWED = {"layer_pattern": PATTERN, "sliding_window": 3}
VARIANTS = {
    "base": {},
    "pattern": {"attention": WINDOWED},
    "experts": {"moe": {"num_experts": 4, "d_ff": 16}},
    "remat": {"numerics": {"remat": "full"}},
}


def lowered(num_layers, **changes):
    model = Transformer(small(num_layers=num_layers, **changes))
    run = jax.jit(functools.partial(loss_and_gradients, model))
    return run.lower(abstract_params(model))


def instructions(text):
    return len(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = ", text, re.M))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_program_does_not_grow_with_depth(variant):
    few, many = (4, 32) if variant != "pattern" else (5, 31)
    texts = [lowered(n, **VARIANTS[variant]).as_text() for n in (few, many)]
    sizes = [instructions(t) for t in texts]
    assert sizes[0] > 300
    assert sizes[1] <= 1.02 * sizes[0]


def test_the_optimized_program_does_not_grow_with_depth():
    sizes = [instructions(lowered(n).compile().as_text()) for n in (4, 32)]
    assert sizes[0] > 300
    assert sizes[1] <= 1.2 * sizes[0]


def test_unrolled_layers_do_grow():
    """The measure sees what it should."""
    sizes = [instructions(lowered(n, numerics={"scan_layers": False}).as_text()) for n in (2, 6)]
    assert sizes[1] > 1.8 * sizes[0]


def test_equal_configs_are_traced_once():
    traces = 0

    def apply(model, params, tokens):
        nonlocal traces
        traces += 1
        return model.apply({"params": params}, tokens)[0]

    jitted = jax.jit(apply, static_argnums=0)
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    for _ in range(3):
        model = Transformer(small(attention=WINDOWED, moe={"num_experts": 4}))
        jitted.trace(model, abstract_params(model), tokens)
    assert traces == 1
    other = Transformer(small(attention=WINDOWED, moe={"num_experts": 4}, dropout=0.5))
    jitted.trace(other, abstract_params(other), tokens)
    assert traces == 2
