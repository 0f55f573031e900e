"""Attention of tokens that stand anywhere, in TPU interpret mode against the same on paper."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.attention import mask as masks
from kernels.flash_attention import At, flash_attention_at, reference
from kernels.flash_attention.blocks import Blocks
from kernels.flash_attention.places import HIDDEN_BLOCK, WHOLE, bounds, in_words, states
from tests.kernels.aot import TOPOLOGIES, compiles, needs_libtpu
from tests.kernels.interpret import INTERPRET, races
from tests.kernels.test_flash_attention import TOLERANCE, arrays, assert_near, results
from tests.marks import slow_but

SMALL = Blocks(128, 128, 128, 128, 256)
RNG = np.random.default_rng(0)


def at(positions, segment_ids=None):
    """One row."""
    ids = np.ones(len(positions)) if segment_ids is None else segment_ids
    return At(*(jnp.asarray(x, jnp.int32)[None] for x in (positions, ids)))


GAPPED = at(np.sort(RNG.choice(900, 500, replace=False)))
PERMUTED = at(RNG.permutation(300), RNG.integers(0, 3, 300))
# A device's tokens of a row that is cut into eight, two parts each: early and late ones together.
ZIGZAG = at(np.concatenate([np.arange(192), np.arange(1344, 1536)]))
NEGATIVE = at(np.arange(300) - 200, np.repeat([3, 0, 1], 100))
CASES = {
    "gapped": {"tokens": GAPPED, "mask": masks.causal()},
    "permuted_alibi": {"tokens": PERMUTED, "mask": masks.sliding_window(90), "slopes": True},
    "lambda_alibi": {
        "tokens": GAPPED,
        "mask": masks.lambda_shaped(100, 5),
        "slopes": True,
        "ceiling": 100,
        "softcap": 3.0,
        "blocks": (Blocks(256, 256, 128, 256, 512, early=1), SMALL),
    },
    "zigzag": {"tokens": ZIGZAG, "mask": masks.causal(), "heads": (4, 2)},
    "prefix": {"tokens": PERMUTED, "mask": masks.prefix(40)},
    "chunked": {"tokens": ZIGZAG, "mask": masks.chunked(100)},
    "full": {"tokens": PERMUTED, "mask": masks.full(), "slopes": True, "head_dim": 80},
    "negative": {"tokens": NEGATIVE, "mask": masks.causal(), "blocks": None},
    "bfloat16": {"tokens": ZIGZAG, "mask": masks.causal(), "dtype": jnp.bfloat16, "slopes": True},
    "queries_of_a_part": {
        "tokens": at(np.arange(256, 384)),
        "keys": at(np.arange(512)),
        "mask": masks.causal(),
        "blocks": None,
    },
    "few_queries": {"tokens": at([5, 300, 7, 850, 2]), "keys": GAPPED, "mask": masks.causal()},
}
IN_EVERY_RUN = 1


@functools.partial(jax.jit, static_argnums=0)
def seen_by(mask, q, k):
    """Which pairs are."""
    same = q.segment_ids[..., None] == k.segment_ids[:, None]
    return mask.to_dense(q.positions, k.positions) & same & (q.segment_ids != 0)[..., None]


def compare(
    *,
    tokens,
    keys=None,
    mask,
    heads=(2, 1),
    head_dim=64,
    dtype=jnp.float32,
    slopes=False,
    blocks=(SMALL, SMALL),
    **options,
):
    """Output, log-sum-exp and all gradients, the log-sum-exp's cotangent too."""
    keys = tokens if keys is None else keys
    q, _, _, d_out = arrays(tokens.positions.shape[1], heads, head_dim, dtype)
    _, k, v, _ = arrays(keys.positions.shape[1], heads, head_dim, dtype)
    options |= {"mask": mask, "scale": head_dim**-0.5}
    if slopes:
        options["slopes"] = jnp.linspace(0.01, 0.1, heads[0])
    seen = seen_by(mask, tokens, keys)
    # The log-sum-exp of nothing is a constant.
    some = np.random.default_rng(5).normal(size=q.shape[:3]).astype(np.float32)
    d_lse = np.where(np.asarray(seen).any(-1)[:, None], some, np.float32(0))

    def of(function, **more):
        return lambda x: function(*x, tokens, keys, **options, **more)

    x, exact = (q, k, v), d_out.astype(jnp.float32)
    kernel = of(flash_attention_at, blocks=blocks, chip="v5e")
    found, grads = results(kernel, x, (d_out, d_lse), False)
    wanted, wanted_grads = results(of(reference.flash_attention_at), x, (exact, d_lse), False)
    for pair in zip((*found, *grads), (*wanted, *wanted_grads), strict=True):
        assert_near(*pair, TOLERANCE[jnp.dtype(dtype).name])


@pytest.mark.parametrize(
    "name",
    slow_but(list(CASES)[:IN_EVERY_RUN], CASES),
)
def test_kernels_agree_with_the_reference(name):
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        compare(**CASES[name])


def test_no_races():
    q, k, v, d_out = arrays(256, (3, 3), 64, jnp.float32)
    tokens = at(np.arange(256)[::-1], np.arange(256) % 3)
    options = {"mask": masks.causal(), "scale": 0.125, "slopes": jnp.ones(3), "chip": "v5e"}

    def attend(x):
        return flash_attention_at(*x, tokens, tokens, **options, blocks=(SMALL, SMALL))

    assert not races(results, attend, (q, k, v), (d_out, d_out[..., 0]), False)


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_hidden_or_whole_only_if_all_its_pairs_are(name):
    """And in an order that has gaps only, all that are."""
    case, block = CASES[name], 4
    q, k = case["tokens"], case.get("keys", case["tokens"])
    q, k = (At(*(x[:, : x.shape[1] // block * block] for x in side)) for side in (q, k))
    assert q.positions.size
    seen = seen_by(case["mask"], q, k)
    tiles = np.asarray(seen[0]).reshape(seen.shape[1] // block, block, -1, block)
    found = np.asarray(jax.jit(states, static_argnums=(0, 3, 4))(case["mask"], q, k, block, block))
    some, every = tiles.any((1, 3)), tiles.all((1, 3))
    assert not (some & (found[0] == HIDDEN_BLOCK)).any()
    assert not (~every & (found[0] == WHOLE)).any()
    if name == "gapped":
        assert (some == (found[0] != HIDDEN_BLOCK)).all()
        assert (every == (found[0] == WHOLE)).all()
    words = np.asarray(jax.jit(in_words)(found)).reshape(found.shape[1], -1)
    for kb in range(found.shape[2]):
        assert ((words[:, kb // 16] >> 2 * (kb % 16) & 3) == found[0, :, kb]).all()
    for (first, end), row in zip(np.asarray(jax.jit(bounds)(found))[0], found[0], strict=True):
        visited = np.flatnonzero(row != HIDDEN_BLOCK)
        wanted = (visited[0], visited[-1] + 1) if visited.size else (0, 0)
        assert (first, end) == wanted


def test_more_scalars_than_there_is_memory():
    """A state for each pair of 1024 query blocks and 1024 key blocks, of 8 rows."""
    x = jax.ShapeDtypeStruct((8, 1, 131072, 64), jnp.bfloat16)
    tokens = At(*[jax.ShapeDtypeStruct((8, 131072), jnp.int32)] * 2)
    options = {"mask": masks.causal(), "scale": 1.0, "blocks": (SMALL, SMALL), "chip": "v5e"}
    attend = functools.partial(flash_attention_at, **options)
    message = "of them states (524288,); allowed: 1032192 bytes a call: fewer rows at a time"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(attend, x, x, x, tokens, tokens)


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for_every_generation(topology):
    """Several stretches of keys, grouped heads, backward too."""
    sizes = {"length": 12288, "heads": 2, "head_dim": 128, "backward": True}
    compiles("kernel_programs_attention:attention_at", sizes, topology)
