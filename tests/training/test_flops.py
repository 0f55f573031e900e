"""The count of arithmetic against the parameters that are really there."""

import math

import jax
import numpy as np
import pytest

from jaxlm.training.flops import (
    copy_bandwidth,
    matmul_parameters,
    matmul_peak,
    train_flops_per_token,
)
from tests.model.configs import CONFIGS, VECTORS, path_name, shapes, small


def counted(name):
    """Numbers in matrices, the experts' by the share that a token uses."""
    config, total = CONFIGS[name], 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(shapes(name)):
        what = path_name(path)
        lookup = what == "embedding" and not config.embedding.tied
        if lookup or what.startswith(("position/", "token_types")) or what.endswith(VECTORS):
            continue
        routed = "/experts/" in what and what.endswith(("/up", "/gate", "/down"))
        share = config.moe.top_k / config.moe.num_experts if routed else 1.0
        total += share * math.prod(x.shape)
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_matmul_parameters_are_those_of_the_tree(name):
    assert matmul_parameters(CONFIGS[name]) == pytest.approx(counted(name), rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 7, 32, 100])
def test_attention_counts_the_visible_pairs(window):
    """Scores and values forward, twice that backward, 2 FLOPs for each pair and dim."""
    kinds = {"layer_pattern": ("sliding",), "sliding_window": window} if window else {}
    config, length = small(attention=kinds), 32
    i, j = np.mgrid[:length, :length]
    visible = (j <= i) & (i - j < (window or length))
    want = 3 * 2 * 2 * visible.sum() / length * config.num_layers * config.d_model
    got = train_flops_per_token(config, length) - 6 * matmul_parameters(config)
    assert got == pytest.approx(want, rel=1e-12)


def test_peak_is_positive():
    assert 1e8 < matmul_peak(128, 1) < 1e17
    assert 1e6 < copy_bandwidth(10_000, 1) < 1e14
