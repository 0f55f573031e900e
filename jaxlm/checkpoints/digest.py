"""SHA-256 of a pytree's contents: one per leaf and one for the whole.

The digest of a leaf covers its path, dtype, shape and values (little-endian, C order), so it does
not depend on the mesh, the file format or the library versions; the whole digest covers the sorted
paths and digests of the leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.checkpoints.leaves import LeafSpec, named_leaves, to_host


def leaf_digest(name: str, spec: LeafSpec, array: np.ndarray) -> str:
    """Hexadecimal SHA-256 of one leaf; reads the C-contiguous array in place, without a copy."""
    header = json.dumps([name, spec.dtype, list(spec.shape), spec.prng])
    hasher = hashlib.sha256(header.encode() + b"\n")
    # As bytes: ml_dtypes arrays (bfloat16, int4) have no buffer interface of their own.
    hasher.update(array.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def whole_digest(leaf_digests: Mapping[str, str]) -> str:
    """Hexadecimal SHA-256 over the lines "path digest", sorted by path."""
    lines = "".join(f"{json.dumps(name)} {leaf_digests[name]}\n" for name in sorted(leaf_digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def tree_digest(tree: Any) -> dict[str, Any]:
    """{"whole": digest, "leaves": {path: digest}} of a pytree of arrays, typed keys and numbers."""
    digests = {}
    for name, leaf in named_leaves(tree).items():
        host = to_host(name, leaf)
        digests[name] = leaf_digest(name, host.spec, host.array)
    return {"whole": whole_digest(digests), "leaves": digests}
