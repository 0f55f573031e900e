"""A document's loss is the same alone in a row and packed into one with others."""

import jax
import numpy as np
import pytest

from jaxlm.data.packing import pack, pieces
from jaxlm.data.store import TokenStore
from jaxlm.model.parameters import init_params
from jaxlm.training.objectives.next_token import LossSpec
from jaxlm.training.step import loss_sums
from tests.marks import slow_but
from tests.training.cases import VOCAB, make_model

LENGTH = 16
SIZES = (3, 12, 6, 9, 2, 17, 5)  # tokens of each document; a row holds the predictions of 17


def packed(documents):
    """Rows of `documents`, each as (tokens, …), as a batch."""
    sizes = np.array([len(d) for d in documents])
    rows = pack(*pieces(sizes, LENGTH), LENGTH)
    store = TokenStore(np.concatenate(documents), rows, LENGTH, int(sizes.sum()), None, "")
    found = [store[i] for i in range(len(store))]
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


@pytest.mark.parametrize("name", slow_but(["experts"], ["plain", "experts"]))
def test_packed_or_alone(name):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, VOCAB, size) for size in SIZES]
    model = make_model(name)
    params = init_params(model, 0)
    sums = jax.jit(lambda batch: loss_sums(model, LossSpec(chunk=4), params, batch)[1][0].nll)
    together = packed(documents)
    rows = len(together["tokens"])
    assert together["segment_ids"].max() > 2 and rows < len(documents)
    losses = {}
    for row in range(rows):
        for segment in range(1, together["segment_ids"][row].max() + 1):
            own = together["segment_ids"] == segment
            own[np.arange(rows) != row] = False
            weights = together["loss_weights"] * own
            losses[tuple(together["tokens"][own])] = float(
                sums({**together, "loss_weights": weights})
            )
    assert len(losses) == len(documents)
    for document in documents:
        alone = packed([document])
        batch = {n: np.pad(x, ((0, rows - 1), (0, 0))) for n, x in alone.items()}
        # The same numbers are summed, beside others' zeros and in another order.
        assert float(sums(batch)) == pytest.approx(losses[tuple(document[:-1])], rel=2e-6)
