"""The shape of Mixtral 8x7B: 46.7 billion parameters, of which a token uses 12.9 billion.

Command   python -m launch.train --config=configs/moe_8x7b.py --workdir=runs/moe_8x7b \
              --config.data.sources=gs://BUCKET/text/*.jsonl.zst \
              --config.data.tokenizer=PATH/tokenizer.json --config.mesh.fsdp=256
Hardware  a TPU pod; fsdp is the number of its chips; on all its hosts: --distributed
Time      weeks; not run by us yet
Result    none yet: this file is a shape and sensible settings
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    config = llama3_8b.get_config()
    config.model.vocab_size = 32_000
    config.model.position_encoding = "rope(base=1000000.0)"
    config.model.moe.num_experts = 8
    config.model.moe.top_k = 2
    return config
