"""What a seed gives, as numbers: a new version of a library can't change it in silence.

The order of data is frozen in tests/data/test_loader.py, the masks of dropout in test_dropout.py.
"""

import jax
import numpy as np

from jaxlm.model.parameters import init_params
from tests.training.cases import make_model

# The first two numbers of each parameter that is drawn, for seed 7. If they change, a run that is
# begun anew is another run: change them knowingly, and say so to the library's users.
FIRST = {
    "embedding": (-0.1856896, 0.09133001),
    "head": (0.2476382, 0.2109413),
    "layers/block_0/attention/k/kernel": (0.2855766, 0.122567),
    "layers/block_0/attention/out/kernel": (0.1096931, 0.05466637),
    "layers/block_0/attention/q/kernel": (0.118789, 0.3518341),
    "layers/block_0/attention/v/kernel": (-0.02484014, 0.2340022),
    "layers/block_0/experts/down": (0.03909042, 0.1953358),
    "layers/block_0/experts/gate": (-0.1395006, -0.2812645),
    "layers/block_0/experts/router/kernel": (-0.4258325, 0.117115),
    "layers/block_0/experts/shared/down/kernel": (0.2159338, 0.07131188),
    "layers/block_0/experts/shared/gate/kernel": (-0.2903715, -0.1100413),
    "layers/block_0/experts/shared/up/kernel": (0.2337593, 0.1788837),
    "layers/block_0/experts/up": (-0.3652527, 0.1776244),
}


def test_initial_parameters():
    leaves = jax.tree_util.tree_leaves_with_path(init_params(make_model("experts"), seed=7))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.reshape(-1)[:2]
        for path, x in leaves
    }
    drawn = {name for name, x in found.items() if x[0] != x[1]}
    assert drawn == FIRST.keys()
    for name, numbers in FIRST.items():
        # Of bits that are exact, through a function whose last bits are each processor's own.
        np.testing.assert_allclose(found[name], numbers, rtol=1e-5, err_msg=name)
