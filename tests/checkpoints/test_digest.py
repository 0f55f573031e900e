import hashlib
import json

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.checkpoints import tree_digest


def small_tree():
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [jnp.asarray([1, -2], jnp.int8), jnp.asarray([0.5, -0.0], jnp.bfloat16)],
        "key": jax.random.key(7),
        "step": 3,
    }


def test_frozen_value():
    """Stored digests must stay valid: over versions of Python, JAX and this library."""
    assert tree_digest(small_tree())["whole"] == (
        "6e5552f812fa3d2baffb8c8f5e3a17231d4cbd24d39b3e4f8a5329fe0dd7c9d3"
    )


@given(hnp.arrays(st.sampled_from([">i4", "<f8", "bool", "<u2"]), hnp.array_shapes(min_dims=0)))
def test_leaf_digest_is_the_documented_formula(array):
    little = array.astype(array.dtype.newbyteorder("<"))
    header = json.dumps(["x/y", array.dtype.name, list(array.shape), None]) + "\n"
    expected = hashlib.sha256(header.encode() + little.tobytes(order="C")).hexdigest()
    digest = tree_digest({"x": {"y": array}})
    assert digest["leaves"] == {"x/y": expected}
    assert digest["whole"] == hashlib.sha256(f'"x/y" {expected}\n'.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"step": 4},
        lambda t: t | {"step": np.int64(3)},
        lambda t: t | {"a": t["a"].T},
        lambda t: t | {"a": t["a"].reshape(3, 2)},
        lambda t: t | {"key": jax.random.key_data(t["key"])},
        lambda t: t | {"key": jax.random.key(7, impl="rbg")},
        lambda t: t | {"b": [t["b"][0], jnp.asarray([0.5, 0.0], jnp.bfloat16)]},
        lambda t: t | {"c": np.zeros(0)},
        lambda t: {"z" if k == "a" else k: v for k, v in t.items()},
    ],
)
def test_any_change_changes_it(change):
    assert tree_digest(change(small_tree()))["whole"] != tree_digest(small_tree())["whole"]


@pytest.mark.parametrize(
    "same",
    [
        lambda t: dict(reversed(t.items())),
        lambda t: t | {"a": jnp.asarray(t["a"])},
        lambda t: t | {"a": np.asfortranarray(t["a"])},
        lambda t: t | {"a": t["a"].astype(">f4")},
        lambda t: t | {"b": tuple(t["b"]), "none": None},
        lambda t: t | {"step": jnp.asarray(3)},
    ],
)
def test_representation_does_not_matter(same):
    assert tree_digest(same(small_tree())) == tree_digest(small_tree())


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": "text"}, TypeError, "state leaf 'a' is a str"),
        ({"a": np.asarray([None])}, TypeError, "'a' has dtype object"),
        ({"a/b": 1}, ValueError, "'a/b': a key with '/'"),
        ({"..": 1}, ValueError, "'..'"),
        ({"a": {"b": 1}, "a.b": 2}, ValueError, "two leaves have one path"),
        (np.zeros(3), ValueError, "allowed: non-empty names"),
    ],
)
def test_what_cannot_be_stored(tree, error, message):
    with pytest.raises(error, match=message):
        tree_digest(tree)
