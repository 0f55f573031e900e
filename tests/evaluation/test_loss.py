"""Held-out loss and loss by position against full logits and NumPy's log-softmax in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluation.loss import evaluate, evaluate_loss_by_position
from tests.decoding import tiny
from tests.marks import slow_but


def log_probs(model, params, tokens, **where):
    where = {name: jnp.asarray(value) for name, value in where.items()}
    logits, _ = model.apply({"params": params}, jnp.asarray(tokens), **where)
    x = np.asarray(logits, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def batch_of(rng, rows, length):
    tokens = rng.integers(0, 256, (rows, length + 1))
    segments = np.ones((rows, length), np.int32)
    segments[-1, length // 2 :] = 0  # a row that ends early
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
        "segment_ids": segments,
        "loss_weights": (segments > 0).astype(np.float32),
    }


def test_held_out_loss_against_full_logits():
    model, params, rng = tiny.model(), tiny.params(), np.random.default_rng(0)
    batches = [batch_of(rng, 3, 20) for _ in range(2)]
    nll, right, count = 0.0, 0, 0
    for b in batches:
        where = {"positions": b["positions"], "segment_ids": b["segment_ids"]}
        p = log_probs(model, params, b["tokens"], **where)
        seen = b["loss_weights"] > 0
        nll -= np.take_along_axis(p, b["targets"][..., None], -1)[..., 0][seen].sum()
        right += (p.argmax(-1) == b["targets"])[seen].sum()
        count += seen.sum()
    got = evaluate(model, params, batches, num_bytes=100)
    assert got.tokens == count
    # float32 logits of size ~10 are right to 1e-6 each
    assert got.loss == pytest.approx(nll / count, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    assert got.accuracy == pytest.approx(right / count)
    assert got.bits_per_byte == pytest.approx(nll / math.log(2) / 100, rel=1e-5)
    assert evaluate(model, params, batches).bits_per_byte is None
    with pytest.raises(ValueError, match="no target"):
        evaluate(model, params, [])


@pytest.mark.parametrize(
    ("length", "bucket", "batch_size"),
    slow_but([(100, 16, 1), (7, 3, 9)], [(100, 16, 1), (64, 64, 2), (7, 3, 9)]),
)
def test_loss_by_position_against_full_logits(length, bucket, batch_size):
    model, params = tiny.model("alibi"), tiny.params()
    windows = np.random.default_rng(1).integers(0, 256, (3, length + 1))
    p = log_probs(model, params, windows[:, :-1])
    nll = -np.take_along_axis(p, windows[:, 1:, None], -1)[..., 0].mean(0)
    got = evaluate_loss_by_position(model, params, windows, bucket, batch_size)
    assert got.start == tuple(range(0, length, bucket))
    want = [nll[s : s + bucket].mean() for s in got.start]
    np.testing.assert_allclose(got.loss, want, rtol=1e-5)
    assert (got.length, got.windows) == (length, 3)


def test_loss_by_position_knows_the_end_of_a_table():
    windows = np.zeros((1, 66), np.int32)
    with pytest.raises(ValueError, match="length=65; allowed: at most 64"):
        evaluate_loss_by_position(tiny.model("learned"), {}, windows)
    with pytest.raises(ValueError, match="allowed"):
        evaluate_loss_by_position(tiny.model(), {}, np.zeros((1, 1), np.int32))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros(9, np.int32), r"windows of shape \(9,\), int32; allowed: token ids"),
        (np.zeros((1, 9)), r"windows of shape \(1, 9\), float64; allowed: token ids"),
        (np.full((1, 9), -1), "windows hold the token -1; allowed: 0 to"),
        (np.full((1, 9), 10**6), "windows hold the token 1000000; allowed: 0 to"),
    ],
)
def test_windows_that_are_no_token_ids(windows, message):
    with pytest.raises(ValueError, match=message):
        evaluate_loss_by_position(tiny.model(), {}, windows)


@pytest.mark.parametrize("name", ["bucket", "batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_loss_by_position_of_no_positions_or_windows(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}; allowed: an integer >= 1"):
        evaluate_loss_by_position(tiny.model(), {}, np.zeros((1, 9), np.int32), **{name: value})
