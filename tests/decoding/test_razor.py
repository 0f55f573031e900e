"""Heads that keep all beside heads that fade, against a slow form of what each of them keeps."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import caches
from jaxlm.attention import mask as masks
from jaxlm.attention.averaged import AveragedLayer
from jaxlm.attention.cached import attend_parts
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.model.config import AttentionConfig, NumericsConfig
from jaxlm.positions.alibi import ALiBi
from kernels.decode_attention import merge
from tests.decoding import tiny

KEEPING = ((3, 0), (2,), (), (1,))
SINKS, WINDOW, GROUP, LENGTHS = 2, 32, 16, (100, 71)
SETTINGS = f"razor(heads={KEEPING}, window={WINDOW}, group={GROUP}, num_sinks={SINKS})"


def config(scan_layers=False):
    """4 layers, 8 query heads of 4 kv heads."""
    return tiny.model().config.replace(
        num_layers=4,
        attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=8),
        numerics=NumericsConfig(scan_layers=scan_layers),
    )


def tokens():
    """Keys and values [layers, batch, length, kv_heads, head_dim], positions and segments."""
    shape = (4, len(LENGTHS), max(LENGTHS), 4, 8)
    kv = jax.random.normal(jax.random.key(0), (2, *shape))
    at = jnp.broadcast_to(jnp.arange(shape[2])[None], shape[1:3])
    return kv, at, (at < jnp.array(LENGTHS)[:, None]).astype(jnp.int32)


def filled(kind, kv):
    cache = kind.init(config(), len(LENGTHS), max(LENGTHS))
    return jax.jit(lambda cache, *new: cache.commit(*new))(cache, tuple(kv), *tokens()[1:])


def new_tokens():
    """Two a row, which see each other in turn."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 2, n, 8)) for i, n in ((1, 8), (2, 4), (3, 4))
    )
    at = jnp.array(LENGTHS)[:, None] + jnp.arange(2)[None]
    sinks, slopes = jnp.linspace(-1, 1, 8), jnp.linspace(0.01, 0.3, 8)
    there = jnp.ones_like(at)
    return AttentionInputs(q, k, v, at, at, there, there, slopes, sink_logits=sinks)


SPEC = AttentionSpec(masks.causal(), 8**-0.5, score=ALiBi().score, score_form="slope")


def left(keys, values, keeps_all):
    """What is left of one head's tokens: (keys, values, positions, of how many tokens each is)."""
    n = len(keys)
    gone = [] if keeps_all else range(SINKS, SINKS + max(0, n - SINKS - WINDOW) // GROUP * GROUP)
    kept = [t for t in range(n) if t not in gone]
    found = [(keys[t], values[t], t, 1) for t in kept]
    if gone:
        at = round(np.mean(gone))
        found.append((keys[gone].mean(0), values[gone].mean(0), at, len(gone)))
    return [np.array(x) for x in zip(*found, strict=True)]


def slowly(layer, new):
    """One softmax a query, of [what is left ‖ new tokens]."""
    kv = np.asarray(tokens()[0], np.float64)[:, layer]
    new = jax.tree.map(np.asarray, new)
    out = np.zeros(new.q.shape)
    for row, head, t in np.ndindex(2, 8, 2):
        of, n = head // 2, LENGTHS[row]
        k, v, at, count = left(*(x[row, :n, of] for x in kv), of in KEEPING[layer])
        k = np.concatenate([k, new.k[row, : t + 1, of]])
        v = np.concatenate([v, new.v[row, : t + 1, of]])
        at, count = np.append(at, range(n, n + t + 1)), np.append(count, [1] * (t + 1))
        s = k @ new.q[row, t, head] * 8**-0.5
        weights = count * np.exp(s - new.head_parameters[head] * (n + t - at))
        out[row, t, head] = weights @ v / (weights.sum() + np.exp(new.sink_logits[head]))
    return out


def test_each_head_attends_to_what_it_has_kept():
    cache, new = filled(caches.parse(SETTINGS), tokens()[0]), new_tokens()
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    for layer in range(4):
        # float32 against float64
        got = jax.jit(lambda view: view.attend(SPEC, new))(cache.layer(layer))
        np.testing.assert_allclose(got, slowly(layer, new), rtol=0, atol=2e-6)


def test_a_mean_of_tokens_that_are_alike_is_as_good_as_they_are():
    """Without their number in its logit it would count as one."""
    kv = jnp.where(jnp.arange(100)[:, None, None] < SINKS, tokens()[0], tokens()[0][:, :, :, 5:6])
    kv = jnp.where(jnp.arange(100)[:, None, None] < 66, kv, tokens()[0])
    spec, new = AttentionSpec(masks.causal(), 8**-0.5), new_tokens()
    views = (filled(caches.parse(one), kv).layer(1) for one in (SETTINGS, "dense"))
    razor, dense = (view.attend(spec, new) for view in views)
    np.testing.assert_allclose(razor, dense, rtol=0, atol=1e-6)  # float32 sums in another order


def test_it_can_be_attended_to_alone_and_merged():
    """As kernels do that know nothing of it; row 1 has none."""
    k, v = jax.random.normal(jax.random.key(5), (2, 2, 1, 4, 8))
    count = jnp.array([40, 0])
    mean = AveragedLayer(
        k, v, count, jnp.array([[20], [0]]), (count[:, None] > 0).astype(jnp.int32)
    )
    new = new_tokens()
    merged = merge([mean.alone(SPEC, new), attend_reference(SPEC, new)])[0]
    one = attend_parts(SPEC, new, [mean.part(SPEC, new, None, None)])
    np.testing.assert_allclose(merged, one, rtol=0, atol=1e-6)  # float32, in another order
