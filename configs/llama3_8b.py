"""The shape of Llama 3 8B: 8.03 billion parameters.

Command   python -m launch.train --config=configs/llama3_8b.py --workdir=runs/llama3_8b \
              --config.data.sources=gs://BUCKET/text/*.jsonl.zst \
              --config.data.tokenizer=PATH/tokenizer.json --config.mesh.fsdp=256
Hardware  a TPU pod; fsdp is the number of its chips; on all its hosts: --distributed
Time      weeks; not run by us yet
Result    none yet: this file is a shape and sensible settings
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    model, data, train = config.model, config.data, config.train
    model.vocab_size = 128_256
    model.num_layers = 32
    model.d_model = 4096
    model.position_encoding = "rope(base=500000.0)"
    model.attention.num_heads = 32
    model.attention.num_kv_heads = 8
    model.feed_forward.d_ff = 14_336
    model.numerics.dtype = "bfloat16"
    model.numerics.remat = "full"
    data.sequence_length = 8192
    data.batch_size = 512
    train.steps = 200_000
    train.z_weight = 1e-4
    train.optimizer.learning_rate = 3e-4
    train.optimizer.warmup_steps = 2000
    train.evaluate_every = 5000
    config.checkpoint.every = 1000
    config.checkpoint.keep_every = 20_000
    return config
