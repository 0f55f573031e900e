"""Mixture of experts: each token through its top-k experts, none dropped."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.model.config import ModelConfig
from jaxlm.model.feed_forward import FeedForward, activate
from jaxlm.model.projection import Projection


class MixtureOfExperts(nn.Module):
    """Routed experts and, beside them, shared ones.

    Tokens are sorted by expert, so that one `ragged_dot` multiplies each group by its expert's
    matrix: no capacity, no dropped token, no padding. The two router losses are sown into the
    "losses" collection, already weighted.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The mixture at every token; `valid` says which tokens count in the losses."""
        c, m = self.config, self.config.moe
        assert m is not None
        flat = x.reshape(-1, c.d_model)
        router = Projection(
            (c.d_model,),
            (m.num_experts,),
            ("embed", None),
            m.router_bias,
            c.param_dtype,
            name="router",
        )
        logits = router(flat.astype(jnp.float32))
        probs = jax.nn.softmax(logits)
        weights, experts = jax.lax.top_k(probs, m.top_k)
        if m.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        self._sow_losses(logits, probs, experts, valid.reshape(-1))
        y = self._routed(flat, experts, weights).reshape(x.shape)
        if m.num_shared_experts:
            y = y + self._shared(x)
        return y

    def _shared(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The shared experts are one MLP of their widths' sum."""
        c, m = self.config, self.config.moe
        assert m is not None
        y = FeedForward(c, c.shared_d_ff, name="shared")(x)
        if m.shared_gate:
            axes = ("embed", None)
            gate = Projection((c.d_model,), (1,), axes, False, c.param_dtype, name="shared_gate")
            y = y * jax.nn.sigmoid(gate(x))
        return y

    def _per_expert(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple) -> Array:
        """A parameter of every expert, [experts, *shape], in the compute dtype."""
        m = self.config.moe
        assert m is not None
        boxed = nn.with_logical_partitioning(init, ("expert", *axes))
        full = (m.num_experts, *shape)
        return self.param(name, boxed, full, self.config.param_dtype).astype(self.config.dtype)

    def _routed(
        self,
        x: Float[Array, "T D"],
        experts: Int[Array, "T k"],
        weights: Float[Array, "T k"],
    ) -> Float[Array, "T D"]:
        """Sort by expert, multiply group by group, put back, weigh."""
        c, f = self.config, self.config.feed_forward
        m = c.moe
        assert m is not None
        order = jnp.argsort(experts.reshape(-1), stable=True)
        sizes = jnp.bincount(experts.reshape(-1), length=m.num_experts).astype(jnp.int32)
        expert = experts.reshape(-1)[order]

        def project(x, name, outputs, axes, gain=1.0):
            """Each row by its expert's matrix."""
            inputs, zeros = x.shape[-1], nn.initializers.zeros
            init = nn.initializers.normal(gain * inputs**-0.5)
            y = jax.lax.ragged_dot(x, self._per_expert(name, init, (inputs, outputs), axes), sizes)
            if f.bias:
                y += self._per_expert(f"{name}_bias", zeros, (outputs,), axes[1:])[expert]
            return y

        xs = x[order // m.top_k]
        up = project(xs, "up", c.d_ff, ("embed", "mlp"))
        gate = project(xs, "gate", c.d_ff, ("embed", "mlp")) if f.gated else None
        h = activate(f.kind, up, gate)
        y = project(h, "down", c.d_model, ("mlp", "embed"), (2 * c.num_layers) ** -0.5)
        back = jnp.argsort(order).reshape(experts.shape)
        return jnp.einsum("tk,tkd->td", weights.astype(y.dtype), y[back])

    def _sow_losses(self, logits, probs, experts, valid) -> None:
        """Load balance (Fedus et al. 2021, equation 4) and router z-loss (Zoph et al. 2022)."""
        m = self.config.moe
        assert m is not None
        count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
        mask = valid.astype(jnp.float32)[:, None]
        chosen = jax.nn.one_hot(experts, m.num_experts, dtype=jnp.float32).sum(1)
        share = (chosen * mask).sum(0) / (count * m.top_k)
        mean_prob = (probs * mask).sum(0) / count
        balance = m.num_experts * (share * mean_prob).sum()
        z = (jax.nn.logsumexp(logits, -1) ** 2 * mask[:, 0]).sum() / count
        self.sow("losses", "load_balance", m.load_balance_weight * balance)
        self.sow("losses", "router_z", m.router_z_weight * z)
