"""Whether our kernels agree with plain jnp: small calls in TPU interpret mode, on a CPU.

python -m launch.kernel_agreement
python -m launch.kernel_agreement flash_attention cross_entropy

A few calls of each kernel, or of those that are named, in each dtype; tests/kernels has many more.
Memory that nothing was written to is NaN, so what is read before it is written shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console
from rich.table import Table

from launch import kernel_agreement_decode, kernel_agreement_training
from launch.kernel_agreement_call import Agreement, Results

# Of the largest number: float32 sums in another order; bfloat16 has 8 bits and is rounded twice.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
AGREEMENTS = (*kernel_agreement_training.AGREEMENTS, *kernel_agreement_decode.AGREEMENTS)


def largest_error(results: Results) -> float:
    """Over all arrays, relative to the largest number of each."""
    worst = 0.0
    for found, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (found, wanted))
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return float(worst)


def chosen(kernels: Sequence[str]) -> list[Agreement]:
    """Those of these kernels; of none, all.

    Raises:
        ValueError: there is no such kernel.
    """
    known = list(dict.fromkeys(a.kernel for a in AGREEMENTS))
    for kernel in kernels:
        if kernel not in known:
            raise ValueError(f"kernel={kernel!r}; allowed: {', '.join(known)}")
    return [a for a in AGREEMENTS if not kernels or a.kernel in kernels]


def main(kernels: Sequence[str]) -> None:
    """Prints a table; exit status 1 if an error is above its limit."""
    agreements = chosen(kernels)
    table = Table(title="Agreement with plain jnp, TPU interpret mode: largest relative error")
    for column in (
        "kernel",
        "call",
        *(f"{dtype} (≤ {limit:g})" for dtype, limit in LIMITS.items()),
    ):
        table.add_column(column)
    good = True
    parameters = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    with pltpu.force_tpu_interpret_mode(parameters):
        for number, agreement in enumerate(agreements, 1):
            line = f"agreement {number}/{len(agreements)} {agreement.kernel}: {agreement.about}"
            print(line, file=sys.stderr, flush=True)
            errors = {dtype: largest_error(agreement.run(dtype)) for dtype in LIMITS}
            good &= all(errors[dtype] <= limit for dtype, limit in LIMITS.items())
            figures = [f"{error:.1e}" for error in errors.values()]
            table.add_row(agreement.kernel, agreement.about, *figures)
    Console(width=120).print(table)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
