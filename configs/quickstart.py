"""Three small models, alike but for their position encoding, and what becomes of them far out.

Command   python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Hardware  2 CPU cores
Time      about five minutes
Result    held-out loss of each, loss by position up to 16 times the training length (a PNG), a
          sample: RoPE gets worse the further past the training length, ALiBi does not, RoPE under
          LM-Infinite does not either, and NoPE stays as it was: the worst within that length
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    model, data, train = config.model, config.data, config.train
    model.num_layers = 4
    model.d_model = 128
    model.attention.num_heads = 4
    data.sources = ("builtin:austen",)
    data.held_out = ("builtin:austen_valid",)
    data.tokenizer = "bpe:1024"
    data.sequence_length = 128
    data.batch_size = 8
    train.steps = 700
    train.optimizer.learning_rate = 3e-3
    train.optimizer.warmup_steps = 50
    config.checkpoint.every = 100
    config.compare.position_encodings = ("rope", "alibi", "nope")
    config.compare.also = ("rope + lm_infinite(num_sinks=4)",)
    config.compare.length = 2048
    config.compare.windows = 24
    config.compare.text = "builtin:austen_valid"
    config.compare.prompt = "Emma was"
    return config
