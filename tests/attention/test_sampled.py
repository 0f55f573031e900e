"""Attention to drawn blocks in training: by kernels and by plain jnp, and in a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jaxlm
from jaxlm.attention import flash
from jaxlm.attention.attend import attend
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.mask import causal
from jaxlm.attention.sampled import SAMPLINGS, BlockSampling, attend_sampled
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.training.config import TrainConfig
from jaxlm.training.objectives.next_token import LossSpec
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import init_state
from jaxlm.training.step import loss_sums, make_train_step
from tests.kernels.interpret import INTERPRET, random

SPEC = AttentionSpec(causal(), 0.125, aligned=True)
# The next block always, those beyond it by half.
TEXT = "block_sampled(128, exponent=9.0, least=0.5, sink_blocks=0)"
HALF = SAMPLINGS.parse(TEXT)
CONFIG = jaxlm.ModelConfig(
    vocab_size=50,
    num_layers=2,
    d_model=32,
    context_length=512,
    attention=jaxlm.AttentionConfig(num_heads=2, num_kv_heads=1),
)


def inputs(T=300):
    """A row of two documents and padding, grouped heads."""
    rng = np.random.default_rng(0)
    q, k, v = (random(rng, 1, T, n, 64) for n in (2, 1, 1))
    ids = jnp.asarray(np.repeat([[4, 1, 0]], [100, 180, T - 280], 1), jnp.int32)
    slots = np.arange(T)[None]
    positions = jnp.asarray(np.where(slots < 100, slots, slots - 100), jnp.int32)
    return AttentionInputs(q, k, v, positions, positions, ids, ids)


def gradients(x, key, sampling):
    def total(q, k, v):
        out, _ = attend_sampled(sampling, key, SPEC, dataclasses.replace(x, q=q, k=k, v=v))
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    (_, out), found = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(x.q, x.k, x.v)
    return out, *found


def test_kernels_agree_with_plain_jnp(monkeypatch):
    x, key = inputs(), jax.random.key(3)
    wanted = gradients(x, key, HALF)
    monkeypatch.setattr(flash, "target_chip", lambda: "v5e")
    mesh = jax.set_mesh(make_mesh(MeshConfig()))
    with mesh, pltpu.force_tpu_interpret_mode(INTERPRET):
        assert "block_sampled" in str(jax.make_jaxpr(lambda: gradients(x, key, HALF))())
        found = gradients(x, key, HALF)
    for a, b in zip(found, wanted, strict=True):  # float32 sums of 300 terms in another order
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_with_all_blocks_it_is_attention():
    x = inputs()
    run = jax.jit(attend_sampled, static_argnums=(0, 2))
    found = run(BlockSampling(128, least=1.0), jax.random.key(0), SPEC, x)
    wanted = jax.jit(attend, static_argnums=(0, 2))(SPEC, x, "reference")
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def batch_of(length):
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, 50)
    batch = {"tokens": tokens, "targets": tokens, "positions": jnp.arange(length)[None]}
    ones = jnp.ones_like(tokens)
    return batch | {"segment_ids": ones, "loss_weights": ones.astype(jnp.float32)}


def test_a_model_draws_in_training_alone():
    """Other blocks by another key, the same by the same one, recomputed too; without dropout."""
    numerics = jaxlm.NumericsConfig(remat="full")
    attention = dataclasses.replace(CONFIG.attention, implementation=TEXT)
    config = CONFIG.replace(attention=attention, numerics=numerics)
    model, plain = jaxlm.Transformer(config), jaxlm.Transformer(CONFIG.replace(numerics=numerics))
    params, batch = jaxlm.init_params(model), batch_of(384)
    sums = jax.jit(loss_sums, static_argnums=(0, 1))
    evaluated, exact = (sums(m, LossSpec(), params, batch)[0] for m in (model, plain))
    assert evaluated == exact

    train = TrainConfig(steps=9)
    optimizer = make_optimizer(train.optimizer, 9)
    state = init_state(model, optimizer, train)
    step = jax.jit(make_train_step(model, optimizer, train))
    losses = [
        step(dataclasses.replace(state, step=jnp.int32(n)), batch)[1]["loss"] for n in (1, 1, 2)
    ]
    mean = sums(model, LossSpec(), state.params, batch)[0] / 384
    assert losses[0] == losses[1]
    assert len({float(x) for x in (*losses, mean)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": 3.0}, "implementation='block_sampled'; allowed: with .* no softcap"),
        ({"sink_logits": True}, "implementation='block_sampled'; .*no sink_logits"),
        ({"layer_pattern": ["sliding"], "sliding_window": 5}, "allowed: with .* global layers"),
        ({"implementation": "block_sampled(100)"}, "block=100; allowed: 128, 256, 512"),
        ({"implementation": "block_sampled(least=0.0)"}, r"least=0.0; allowed: a number in \(0, 1"),
        ({"implementation": "block_sampled(exponent=-1)"}, "exponent=-1; allowed: a number >= 0"),
        ({"implementation": "block_sampled(sink_blocks=-1)"}, "sink_blocks=-1; allowed: an integ"),
        ({"implementation": "block_sampled(blocks=1)"}, "unknown field 'blocks'"),
        ({"implementation": "sampled"}, "allowed: auto, .* all_to_all, block_sampled"),
    ],
)
def test_what_cannot_be_sampled(changes, message):
    values = {"implementation": "block_sampled", **changes}
    with pytest.raises(ValueError, match=message):
        jaxlm.ModelConfig.from_dict({"vocab_size": 50, "attention": values})


@pytest.mark.parametrize("encoding", ["alibi", "lm_infinite(window=8)"])
def test_encodings_that_cannot_be_sampled(encoding):
    attention = dataclasses.replace(CONFIG.attention, implementation="block_sampled")
    with pytest.raises(ValueError, match=r"position_encoding=.*; allowed: with block_sampled"):
        CONFIG.replace(attention=attention, position_encoding=encoding)
