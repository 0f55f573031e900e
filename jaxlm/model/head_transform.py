"""What BERT's hidden states pass on their way to the logits."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from jaxlm.model.config import ModelConfig
from jaxlm.model.feed_forward import ACTIVATIONS
from jaxlm.model.norms import Norm
from jaxlm.model.projection import Projection


class HeadTransform(nn.Module):
    """norm(activation(dense(x))), the activation being the MLP's."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Of every token, in x's dtype."""
        c = self.config
        width = (c.d_model,)
        dense = Projection(width, width, ("embed", None), True, c.param_dtype, name="dense")
        y = ACTIVATIONS[c.feed_forward.kind](dense(x))
        return Norm(c.norm, c.param_dtype, name="norm")(y)
