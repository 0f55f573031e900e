"""A small model of bytes, with weights large enough that its choices are not all alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.tokenizers import Bytes
from jaxlm.model.config import AttentionConfig, EmbeddingConfig, ModelConfig
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer

TOKENIZER = Bytes()


def model(encoding="rope", **changes):
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        num_layers=2,
        d_model=32,
        context_length=64,
        position_encoding=encoding,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    )
    return Transformer(config.replace(**changes))


@functools.cache
def params(encoding="rope"):
    return jax.tree.map(lambda x: 3 * x, init_params(model(encoding), 0))


@functools.cache
def steady(ranked, context_length=64):
    """A model whose most probable next tokens are these characters in this order, whatever comes
    before; ids that the tokenizer has not are more probable than all but the first.
    """
    embedding = EmbeddingConfig(head_bias=True)
    one = model(vocab_size=264, embedding=embedding, context_length=context_length)
    bias = np.full(264, -1000.0, np.float32)
    bias[TOKENIZER.encode(ranked)] = -np.arange(len(ranked))
    bias[TOKENIZER.vocab_size :] = -0.5
    zeros = jax.tree.map(jnp.zeros_like, init_params(one, 0))
    return one, zeros | {"head_bias": jnp.asarray(bias)}


@functools.partial(jax.jit, static_argnums=0)
def _all_logits(one, weights, tokens):
    return one.apply({"params": weights}, tokens)[0]


def next_logits(one, weights, row, length=64):
    """Logits after `row` by a full forward; padded on the right, so that one program serves all."""
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(row)] = row
    return np.asarray(_all_logits(one, weights, tokens))[0, len(row) - 1]
