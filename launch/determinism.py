"""What each backend needs so that a run, started again, repeats itself to the bit."""

from __future__ import annotations

import os

from absl import flags

DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "Equal bits each time: on GPUs sums in a fixed order and kernels that no stopwatch picks, at a "
    "cost in speed. CPUs and TPUs need nothing for that.",
)
# Read by GPUs alone; all backends know them.
XLA_FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def start() -> None:
    """Sets what --deterministic asks for; before JAX has a backend, which reads it once.

    Raises:
        ValueError: XLA_FLAGS says otherwise.
    """
    if not DETERMINISTIC.value:
        return
    given = os.environ.get("XLA_FLAGS", "").split()
    for flag in XLA_FLAGS:
        name = flag.partition("=")[0]
        other = [g for g in given if g.partition("=")[0] == name and g != flag]
        if other:
            raise ValueError(f"XLA_FLAGS has {other[0]}; allowed with --deterministic: {flag}")
    os.environ["XLA_FLAGS"] = " ".join([*given, *(f for f in XLA_FLAGS if f not in given)])
