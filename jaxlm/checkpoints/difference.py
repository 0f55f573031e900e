"""How two steps differ, of one run or of two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlm.checkpoints.config_file import differences
from jaxlm.checkpoints.leaves import LeafSpec
from jaxlm.checkpoints.manifest import STATE, Manifest
from jaxlm.checkpoints.verify import verified_arrays

PLACES = ("in the first", "in the second")


def step_differences(first: tuple[Path, Manifest], second: tuple[Path, Manifest]) -> Iterator[str]:
    """A line for each field of the metadata, each other file and each leaf that differ; none: the
    steps were saved equal to the bit. Only leaves whose SHA-256 differ are read, a pair at a time.

    Args:
        first, second: folder and verified manifest of a step.

    Raises:
        BadStepError: a leaf's bytes are not those that were saved.
    """
    (_, a), (_, b) = first, second
    yield from differences(a.metadata, b.metadata, "metadata", PLACES)
    for name in sorted(a.files.keys() | b.files.keys()):
        digests = [f.sha256 if (f := m.files.get(name)) else "absent" for m in (a, b)]
        if not name.startswith(f"{STATE}/") and digests[0] != digests[1]:
            yield f"{name}: {digests[0]} {PLACES[0]}, {digests[1]} {PLACES[1]}"
    for name in sorted(a.leaves.keys() | b.leaves.keys()):
        one, other = a.leaves.get(name), b.leaves.get(name)
        if one is None or other is None or one != other:
            yield f"{name}: {_text(one)} {PLACES[0]}, {_text(other)} {PLACES[1]}"
        elif a.leaf_digests[name] != b.leaf_digests[name]:
            left, right = (verified_arrays(*of, [name])[name] for of in (first, second))
            yield f"{name}: {distance(left, right)}"


def distance(left: np.ndarray, right: np.ndarray) -> str:
    """How many numbers of two arrays of one shape and dtype differ, and by how much: bits decide,
    so NaN equals itself and 0 is not -0.
    """
    size, width = left.size, left.dtype.itemsize
    bits = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (left, right))
    one, other = (x.reshape(size, width) for x in bits)
    count = int((one != other).any(axis=1).sum())
    wide = np.complex128 if left.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(left.astype(wide) - right.astype(wide))
    finite = apart[np.isfinite(apart)]
    largest = f", by up to {finite.max():.3g}" if finite.size else ""
    return f"{count:,} of {size:,} numbers differ{largest}"


def _text(spec: LeafSpec | None) -> str:
    if spec is None:
        return "absent"
    key = f" (a key of {spec.prng})" if spec.prng else ""
    return f"{spec.dtype}{list(spec.shape)}{key}"
