"""The shape of Llama 3 70B: 70.6 billion parameters.

Command   python -m launch.train --config=configs/llama3_70b.py --workdir=runs/llama3_70b \
              --config.data.sources=gs://BUCKET/text/*.jsonl.zst \
              --config.data.tokenizer=PATH/tokenizer.json \
              --config.mesh.fsdp=256 --config.mesh.tensor=4
Hardware  a thousand TPU chips or more; fsdp × tensor is their number; all hosts: --distributed
Time      months; not run by us yet
Result    none yet: this file is a shape and sensible settings
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    config = llama3_8b.get_config()
    model = config.model
    model.num_layers = 80
    model.d_model = 8192
    model.attention.num_heads = 64
    model.feed_forward.d_ff = 28_672
    config.data.batch_size = 1024
    config.train.optimizer.learning_rate = 1.5e-4
    return config
