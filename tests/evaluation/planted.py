"""A model whose heads are known, as they are written into its parameters by hand."""

import jax
import numpy as np

from jaxlm.model.config import AttentionConfig, EmbeddingConfig, ModelConfig, NumericsConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer


def planted(vocab, length, scan_layers=True, says=False):
    """Two layers of two kv heads of two query heads each; embeddings and positions are unit
    vectors. In layer 0 query head 0 sees the token before it and says which it is, and 3 is an echo
    head; in layer 1 query head 1 is an induction head. The others see all tokens alike.

    Args:
        says: what the induction head finds is the model's next token; else it adds nothing.
    """
    token, place = slice(0, vocab), slice(vocab, vocab + length)
    before = slice(vocab + length, 2 * vocab + length)
    config = ModelConfig(
        vocab_size=vocab,
        num_layers=2,
        d_model=before.stop,
        context_length=length,
        position_encoding="learned",
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=before.stop),
        embedding=EmbeddingConfig(tied=says),
    )
    shapes = abstract_params(Transformer(config))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params["embedding"][:, token] = np.eye(vocab)
    params["position"]["table"][:, place] = np.eye(length)
    block = params["layers"]["block_0"]
    block["attention_norm"]["scale"] += 1
    q, k, v, out = (block["attention"][name]["kernel"] for name in ("q", "k", "v", "out"))
    q[0, place, 0, place] = 5 * np.eye(length)
    k[0, place, 0, place] = np.eye(length, k=1)
    v[0, token, 0, before] = np.eye(vocab)
    out[0, 0, before, before] = np.eye(vocab)
    q[0, token, 3, token], k[0, token, 1, token] = 5 * np.eye(vocab), np.eye(vocab)
    q[1, token, 1, before], k[1, before, 0, before] = 20 * np.eye(vocab), np.eye(vocab)
    if says:  # more than the token that is there already
        v[1, token, 0, token] = np.eye(vocab)
        out[1, 1, token, token] = 5 * np.eye(vocab)
        params["final_norm"]["scale"] += 1
    if not scan_layers:
        params = unroll_layers(config, params)
        config = config.replace(numerics=NumericsConfig(scan_layers=False))
    return Transformer(config), jax.device_put(params)
