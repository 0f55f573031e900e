"""Language models in JAX with swappable position encodings.

model, params, tokenizer = jaxlm.load("runs/quickstart")
longer = model.with_position_encoding("lm_infinite", window=256, num_sinks=4)
print(jaxlm.generate(longer, params, tokenizer, ["Emma was"], max_new_tokens=64))
"""

from jaxlm import positions
from jaxlm.caches.dense import DenseCache
from jaxlm.data.chat import chat_example, chat_prompt
from jaxlm.data.config import DataConfig
from jaxlm.data.documents import long_windows
from jaxlm.data.loader import held_out_batches
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.decoding.generate import generate, stream
from jaxlm.embedding.embed import embed
from jaxlm.evaluation.charts import draw_loss_by_position
from jaxlm.evaluation.loss import evaluate, evaluate_loss_by_position
from jaxlm.load import load
from jaxlm.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    NumericsConfig,
)
from jaxlm.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxlm.model.parameters import count_params, init_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.compiles import count_compiles
from jaxlm.training.run import RunConfig
from jaxlm.training.train import train

__all__ = [
    "AttentionConfig",
    "DataConfig",
    "DenseCache",
    "EmbeddingConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FeedForwardConfig",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "NumericsConfig",
    "RunConfig",
    "Transformer",
    "chat_example",
    "chat_prompt",
    "count_compiles",
    "count_params",
    "draw_loss_by_position",
    "embed",
    "evaluate",
    "evaluate_loss_by_position",
    "generate",
    "held_out_batches",
    "init_params",
    "load",
    "load_tokenizer",
    "long_windows",
    "positions",
    "stream",
    "train",
]
