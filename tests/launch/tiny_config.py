"""A run of seconds: two sources mixed, dropout, experts, an average of the parameters.

--config=tests/launch/tiny_config.py:FOLDER            with FOLDER/{one,two,held_out}.txt
--config=tests/launch/tiny_config.py:FOLDER,compare    two position encodings, one after the other
"""

from ml_collections import ConfigDict

from configs import default


def get_config(text: str) -> ConfigDict:
    folder, _, kind = text.partition(",")
    config = default.get_config()
    model, data, train = config.model, config.data, config.train
    model.num_layers = 2
    model.d_model = 32
    model.attention.num_heads = 2
    model.dropout = 0.1
    model.moe.num_experts = 4
    model.moe.d_ff = 16
    data.sources = ({"path": f"{folder}/one.txt", "weight": 3.0}, f"{folder}/two.txt")
    data.held_out = (f"{folder}/held_out.txt",)
    data.sequence_length = 32
    data.batch_size = 4
    train.steps = 40
    train.loss_chunk = 16
    train.ema_decay = 0.9
    train.log_every = 5
    train.evaluate_every = 15
    train.optimizer.warmup_steps = 5
    train.optimizer.learning_rate = 1e-2
    config.checkpoint.every = 10
    if kind == "compare":
        compare = config.compare
        compare.position_encodings = ("rope", "alibi")
        compare.also = ("rope + lm_infinite(num_sinks=2)",)
        compare.length = 64
        compare.bucket = 16
        compare.windows = 2
        compare.text = f"{folder}/held_out.txt"
        compare.prompt = "it was"
    return config
