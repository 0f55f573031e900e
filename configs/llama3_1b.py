"""The shape of Llama 3.2 1B: 1.24 billion parameters, tied embeddings.

Command   python -m launch.train --config=configs/llama3_1b.py --workdir=runs/llama3_1b \
              --config.data.sources=gs://BUCKET/text/*.jsonl.zst \
              --config.data.tokenizer=PATH/tokenizer.json --config.mesh.fsdp=16
Hardware  16 TPU chips or more; fsdp is their number; all hosts: --distributed
Time      days; not run by us yet
Result    none yet: this file is a shape and sensible settings
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    config = llama3_8b.get_config()
    model = config.model
    model.num_layers = 16
    model.d_model = 2048
    model.embedding.tied = True
    model.feed_forward.d_ff = 8192
    config.train.optimizer.learning_rate = 6e-4
    return config
