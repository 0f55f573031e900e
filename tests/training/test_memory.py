"""What the compiled step needs: no logits of a whole batch, and no second copy of the state."""

import jax
import jax.numpy as jnp
import optax

from jaxlm.model.parameters import placed_params
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.training.config import OptimizerConfig, TrainConfig
from jaxlm.training.loop import compile_step
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import abstract_state
from jaxlm.training.step import make_train_step
from tests.training.cases import make_model

B, T, V = 4, 128, 32_768
LOGITS = B * T * V * 4


def abstract_batch():
    ints = ("tokens", "targets", "positions", "segment_ids")
    shapes = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ints}
    return shapes | {"loss_weights": jax.ShapeDtypeStruct((B, T), jnp.float32)}


def test_full_logits_never_exist_and_the_state_is_donated():
    model = make_model(vocab_size=V, context_length=T)
    config = TrainConfig(loss_chunk=4)
    optimizer = make_optimizer(OptimizerConfig(), config.steps)
    mesh = make_mesh(MeshConfig())
    state = abstract_state(placed_params(model, mesh), optimizer, config, mesh)
    step = compile_step(make_train_step(model, optimizer, config), state)
    memory = step.lower(state, abstract_batch()).compile().memory_analysis()
    # A chunk's logits, the gradients and a few of their temporaries.
    assert memory.temp_size_in_bytes < LOGITS / 2
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == size

    # The same measure finds them where they do exist.
    def full(params, batch):
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        logits, _ = model.apply({"params": params}, *inputs)
        targets = batch["targets"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    naive = jax.jit(jax.grad(full)).lower(state.params, abstract_batch()).compile()
    assert naive.memory_analysis().temp_size_in_bytes > LOGITS
