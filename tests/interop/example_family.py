"""An example of a family: Llama's model under names of its own, with one matrix for q, k and v.

A file like this one in jaxlm/interop/families/ and its FAMILY in the list there are all it takes.
"""

from jaxlm.interop.family import Family
from jaxlm.interop.fields import GATED, Activation, Field, Fixed, Key
from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig

# Keys of config.json, and the fields of a ModelConfig that they fill; read both ways.
FIELDS: tuple[Field, ...] = (
    Key("vocab", "vocab_size"),
    Key("depth", "num_layers"),
    Key("width", "d_model"),
    Key("block_size", "context_length"),
    Key("heads", "attention.num_heads"),
    Key("hidden", "feed_forward.d_ff"),
    Activation(GATED, "act"),
    Key("eps", "norm.epsilon", 1e-5),
    Fixed("position_encoding", "alibi"),
    Fixed("embedding.tied", True),
)


def rows(config: ModelConfig) -> list[Row]:
    """The tensors of a file, the parameters they hold, and how their axes turn; read both ways."""
    qkv = " ".join(f"attention/{name}/kernel" for name in ("q", "k", "v"))
    return [
        Row("wte", "embedding", "v d -> v d"),
        Row("norm", "final_norm/scale", "d -> d"),
        Row("blocks.{layer}.norm1", "attention_norm/scale", "d -> d"),
        Row("blocks.{layer}.norm2", "feed_forward_norm/scale", "d -> d"),
        Row("blocks.{layer}.qkv", qkv, "(p h) d -> d p h"),
        Row("blocks.{layer}.proj", "attention/out/kernel", "d (n h) -> n h d"),
        Row("blocks.{layer}.gate", "feed_forward/gate/kernel", "o i -> i o"),
        Row("blocks.{layer}.up", "feed_forward/up/kernel", "o i -> i o"),
        Row("blocks.{layer}.down", "feed_forward/down/kernel", "o i -> i o"),
    ]


FAMILY = Family(("ExampleForCausalLM",), "example", FIELDS, rows)
