"""A GPT-2-sized model (about 110M parameters) of prose and code, mixed two to one.

Command   python -m launch.train --config=configs/small.py --workdir=runs/small
Hardware  one accelerator chip with 16 GB; a CPU takes days
Time      a few hours; not run by us yet
Result    for real results set data.sources to a corpus of billions of tokens: the built-in texts
          last a few minutes
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    model, data, train = config.model, config.data, config.train
    model.num_layers = 12
    model.d_model = 768
    model.attention.num_heads = 12
    model.embedding.tied = True
    model.numerics.dtype = "bfloat16"
    data.sources = (
        {"path": "builtin:austen", "weight": 2.0},
        {"path": "builtin:python", "weight": 1.0},
    )
    data.tokenizer = "bpe:32000"
    data.sequence_length = 1024
    data.batch_size = 64
    train.steps = 20_000
    train.microbatches = 4
    train.z_weight = 1e-4
    train.optimizer.learning_rate = 6e-4
    train.optimizer.warmup_steps = 1000
    train.evaluate_every = 1000
    config.checkpoint.every = 1000
    return config
