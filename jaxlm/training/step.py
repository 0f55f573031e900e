"""One optimizer step, compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.model.config import ModelConfig
from jaxlm.model.partition import combine
from jaxlm.model.quantized import whole
from jaxlm.model.transformer import Transformer
from jaxlm.training.config import TrainConfig
from jaxlm.training.objectives.next_token import LossSpec, LossSums, next_token_loss
from jaxlm.training.objectives.next_token_on_tpu import fits, next_token_loss_on_tpu
from jaxlm.training.optimizers import learning_rate
from jaxlm.training.state import TrainState

# tokens, targets, positions, segment_ids: int32 [batch, length]; loss_weights: float32.
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]
NONE: Mapping[str, Any] = {}


def loss_spec(model: ModelConfig, train: TrainConfig) -> LossSpec:
    """The loss's static half."""
    return LossSpec(train.loss_chunk, model.embedding.logit_softcap, train.z_weight)


def loss_sums(
    model: Transformer, spec: LossSpec, params: Any, batch: Batch, rngs: Any = None
) -> tuple[Float[Array, ""], tuple[LossSums, Float[Array, ""]]]:
    """The weighted loss summed over a batch, its parts, and the sum of the experts' losses.

    The experts' losses are means over the batch; they are not in the first value.

    Raises:
        ValueError: a model whose tokens see the token to predict.
    """
    c = model.config
    if c.sees_ahead:
        raise ValueError(
            f"model.attention: layer_pattern={c.attention.layer_pattern}; allowed: no "
            "bidirectional layer where the next token is predicted"
        )
    (hidden, _), sown = model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        method="hidden",
        rngs=rngs,
        mutable=["losses"],
    )
    hidden = model.apply({"params": params}, hidden, method="head_input")
    tied = c.embedding.tied
    matrix = whole(params, "embedding" if tied else "head").astype(c.dtype)
    bias = params["head_bias"] if c.embedding.head_bias else None
    rest = bias, batch["targets"], batch["loss_weights"]
    if fits(hidden):
        total, sums = next_token_loss_on_tpu(spec, hidden, matrix, *rest, tied=tied)
    else:
        total, sums = next_token_loss(spec, hidden, matrix.T if tied else matrix, *rest)
    experts = sum((x.sum() for x in jax.tree.leaves(sown)), jnp.zeros((), jnp.float32))
    return total, (sums, experts)


@runtime_checkable
class Objective(Protocol):
    """What a step minimizes."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What sums are divided by."""

    def __call__(
        self, params: Any, reference: Any, batch: Batch, rngs: Any = None
    ) -> tuple[Float[Array, ""], tuple[dict[str, Array], Float[Array, ""]]]:
        """The sum to minimize, and (sums to report, the experts' losses, which are means)."""


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The next token's cross entropy, over all weighted targets.

    Attributes:
        model: whose parameters are learned.
        spec: of the loss.
    """

    model: Transformer
    spec: LossSpec

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The targets' weights."""
        return batch["loss_weights"].sum()

    def __call__(
        self, params: Any, reference: Any, batch: Batch, rngs: Any = None
    ) -> tuple[Float[Array, ""], tuple[dict[str, Array], Float[Array, ""]]]:
        """See `loss_sums`; there is no reference."""
        del reference
        total, (sums, experts) = loss_sums(self.model, self.spec, params, batch, rngs)
        named = {"loss": sums.nll, "z": sums.z, "accuracy": sums.correct}
        return total, (named, experts)


def _mean_gradients(
    model: Transformer, config: TrainConfig, objective: Objective
) -> Callable[..., Any]:
    """(params, batch, key, frozen) → gradients, (sums, experts' losses), the batch's weight.

    The gradients are those of the mean over the batch; there are none of `frozen`.
    """

    def of_part(params, part, weight, key, frozen):
        """One microbatch: sums over its targets / all targets."""

        def scalar(p):
            c = model.config
            drawn = c.dropout > 0 or c.attention.sampling is not None
            rngs = {"dropout": key} if drawn else None
            total, (sums, experts) = objective(combine(frozen, p), frozen, part, rngs)
            return total / weight + experts / config.microbatches, (sums, experts)

        (_, aux), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, aux

    def of_batch(params, batch, key, frozen):
        """All microbatches, one at a time."""
        m = config.microbatches
        weight = jnp.maximum(objective.weight(batch), 1.0)
        if m == 1:
            return *of_part(params, batch, weight, key, frozen), weight
        # Every m-th row: rows lie in blocks over the devices, so each part keeps all of them busy.
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // m, m, *x.shape[1:]).swapaxes(0, 1), dict(batch)
        )

        def body(carry, x):
            part, i = x
            new = of_part(params, part, weight, jax.random.fold_in(key, i), frozen)
            return jax.tree.map(jnp.add, carry, new), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(of_part, params, first, weight, key, frozen)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, (sums, experts)), _ = jax.lax.scan(body, zeros, (parts, jnp.arange(m)))
        return grads, (sums, experts / m), weight

    return of_batch


def _advance(
    config: TrainConfig, state: TrainState, fine: Array, params: Any, optimizer: Any
) -> TrainState:
    """The next state; where the step is not fine, the old one with other counters."""
    ema = state.ema
    if config.ema_decay is not None:
        # Shorter at first: the initial values would stay in the average for 1 / (1 - decay) steps.
        taken = (state.step - state.bad_steps[0]).astype(jnp.float32)
        d = jnp.minimum(config.ema_decay, (1 + taken) / (10 + taken))
        ema = jax.tree.map(lambda e, p: e * d + p.astype(jnp.float32) * (1 - d), ema, params)

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)

    bad, in_a_row = jnp.where(fine, 0, 1), jnp.where(fine, 0, state.bad_steps[1] + 1)
    return TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        optimizer=keep(optimizer, state.optimizer),
        ema=keep(ema, state.ema),
        bad_steps=jnp.stack([state.bad_steps[0] + bad, in_a_row]),
    )


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    objective: Objective | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`train_step(state, batch, frozen={}) → (state, metrics)`; jit it with the state donated.

    `frozen` are parameters of the model that the state lacks, such as those below an adapter; they
    are also the reference of an objective that compares. `objective` None: next tokens.

    The loss is the mean over all weighted targets of the batch, whatever the number of
    microbatches. A step whose loss, gradient or new parameters are not finite changes
    nothing but the counters.
    """
    objective = objective or NextToken(model, loss_spec(model.config, config))
    gradients = _mean_gradients(model, config, objective)
    schedule = learning_rate(config.optimizer, config.steps)

    def train_step(
        state: TrainState, batch: Batch, frozen: Mapping[str, Any] = NONE
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, (sums, experts), weight = gradients(state.params, batch, key, frozen)
        norm, means = optax.tree.norm(grads), {name: x / weight for name, x in sums.items()}
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Skipped steps leave the optimizer's own count of steps behind.
        rate = schedule(state.step - state.bad_steps[0])
        # A finite gradient may still give an update that is not.
        kept = [jnp.isfinite(p).all() for p in jax.tree.leaves(params)]
        fine = jnp.stack([jnp.isfinite(means["loss"]), jnp.isfinite(norm), *kept]).all()
        state = _advance(config, state, fine, params, optimizer_state)
        metrics = {
            **means,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "targets": weight,
            "bad_steps": state.bad_steps[0].astype(jnp.float32),
            "bad_in_a_row": state.bad_steps[1].astype(jnp.float32),
        }
        if model.config.moe is not None:
            metrics["expert_losses"] = experts
        return state, metrics

    return train_step
