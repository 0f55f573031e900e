"""The oracle's hand-written gradients against central differences of its values."""

import numpy as np
import pytest

from tests.attention import oracle
from tests.attention.cases import Case, build

CASES = [
    Case(sizes=(1, 9, 9, 2, 1, 3), sinks=True),
    Case(sizes=(1, 9, 9, 2, 2, 3), mask="lambda", score="table", softcap=2.5),
    Case(sizes=(1, 9, 9, 2, 1, 3), mask="prefix", score="multiplicative", ceiling=4, far=True),
    Case(sizes=(1, 5, 9, 2, 1, 3), score="alibi", ceiling=4, aligned=False),
    Case(sizes=(1, 9, 9, 1, 1, 3), score="by_query", softcap=2.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_slopes(case):
    _, _, problem = build(case)
    rng = np.random.default_rng(1)
    out, lse = oracle.attend(problem)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape) * np.isfinite(lse)

    def loss():
        out, lse = oracle.attend(problem)
        return (out * d_out).sum() + (np.where(np.isfinite(lse), lse, 0.0) * d_lse).sum()

    for name, gradient in oracle.gradients(problem, d_out, d_lse).items():
        array = problem.arrays[name]
        direction, here, step = rng.normal(size=array.shape), array.copy(), 1e-5
        array[...] = here + step * direction
        above = loss()
        array[...] = here - step * direction
        slope = (above - loss()) / (2 * step)
        array[...] = here
        # Truncation is O(step²) = 1e-10, rounding O(1e-16 / step) = 1e-11, both times O(10).
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7, atol=1e-8)
