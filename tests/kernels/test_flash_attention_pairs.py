"""A few small cases in which every two of flash attention's features meet."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import HEAD_DIMS
from tests.kernels.interpret import INTERPRET
from tests.kernels.test_flash_attention import compare

PATTERNS = {
    "causal": {},
    "full": {"ahead": None},
    "window": {"window": 90},
    "prefix": {"prefix": 50},
    "sinks": {"window": 128, "sinks": "far"},
}
SEGMENTS = np.repeat([-1, 0, 7], [150, 20, 60]).astype(np.int32)
PARTS = {
    "bias": {"bias": True},
    "factor": {"factor": True},
    "softcap": {"softcap": 3.0},
    "segments": {"segment_ids": SEGMENTS},
    "grouped": {"heads": (2, 1)},
}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
CASES = [
    (64, "float32", "prefix", "bias segments"),
    (64, "bfloat16", "causal", "factor softcap grouped"),
    (80, "float32", "sinks", "factor softcap segments grouped"),
    (80, "bfloat16", "full", "bias"),
    (96, "float32", "full", "softcap segments grouped"),
    (96, "bfloat16", "full", "factor"),
    (96, "bfloat16", "window", "bias factor grouped"),
    (128, "float32", "causal", "bias factor softcap"),
    (128, "bfloat16", "causal", "segments grouped"),
    (192, "bfloat16", "prefix", "factor softcap grouped"),
    (192, "float32", "sinks", "bias segments"),
    (256, "float32", "window", "softcap segments"),
    (256, "bfloat16", "sinks", "bias factor grouped"),
]


# The others under the mark: each takes some eight seconds.
IN_EVERY_RUN = 1


@pytest.mark.parametrize(
    ("head_dim", "dtype", "pattern", "parts"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if number >= IN_EVERY_RUN else [])
        for number, case in enumerate(CASES)
    ],
)
def test_kernels_agree_with_the_reference(head_dim, dtype, pattern, parts):
    case = {"length": SEGMENTS.size, "heads": (1, 1), "head_dim": head_dim, **PATTERNS[pattern]}
    for part in parts.split():
        case |= PARTS[part]
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        compare(**case, dtype=DTYPES[dtype])


def test_every_two_meet():
    """But head_dim and pattern, of which there are more pairs than cases."""
    choices = [HEAD_DIMS, DTYPES, PATTERNS, *[(False, True)] * len(PARTS)]
    cases = [(*case[:3], *(part in case[3].split() for part in PARTS)) for case in CASES]
    for a, b in itertools.combinations(range(len(choices)), 2):
        if (a, b) != (0, 2):
            met = {(case[a], case[b]) for case in cases}
            assert met == set(itertools.product(choices[a], choices[b])), (a, b)
