"""A low-rank adapter (LoRA) of a checkpoint, learned on a text.

Command   python -m launch.train --config=configs/finetune.py --workdir=runs/finetune
          --config.finetune.checkpoint=MODEL.gguf
Hardware  2 CPU cores for 135 million parameters; an accelerator for more
Time      6 minutes for SmolLM2-135M
Result    its loss on another novel falls from 3.488 to 3.353 nats a token (launch.evaluate
          --length=1024 --bucket=1024 --noheld_out --text=builtin:austen_valid)

All parameters: --config.finetune.adapter.rank=None. Chats: --config.data.sources=FILE.chat.jsonl
(a line {"messages": [{"role": "user", "content": "…"}, …]} each; only the answers are learned).
Another position encoding on the way: --config.model.position_encoding='lm_infinite(window=2048)'.
"""

from ml_collections import ConfigDict

from configs import default
from jaxlm.model.config import ModelConfig


def get_config() -> ConfigDict:
    config = default.get_config()
    with config.ignore_type():  # what is None here is the checkpoint's
        config.model = default.blank(ModelConfig)
    data, train, finetune = config.data, config.train, config.finetune
    finetune.checkpoint = "runs/quickstart"
    finetune.adapter.rank = 16
    finetune.adapter.alpha = 32.0
    data.sources = ("builtin:austen",)
    data.held_out = ()
    data.tokenizer = "checkpoint"
    data.sequence_length = 256
    data.batch_size = 4
    train.steps = 40
    train.optimizer.learning_rate = 1e-3
    train.optimizer.warmup_steps = 10
    train.optimizer.weight_decay = 0.0
    config.checkpoint.every = 20
    return config
