"""The program of a tiny model, as a hash: a refactor that keeps it has changed nothing.

python -m tests.model.fingerprint --update

writes the hashes of the installed jax into fingerprints.json; a change of the model's arithmetic
needs this, once with each version of jax that is listed there. Without the flag they are printed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.model.config import ModelConfig
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.objectives.next_token import LossSpec
from jaxlm.training.step import loss_sums

STORED = Path(__file__).parent / "fingerprints.json"
MODELS = {
    "dense": {"attention": {"num_heads": 4, "num_kv_heads": 2}},
    "experts": {
        "attention": {"num_heads": 4, "layer_pattern": ("global", "sliding"), "sliding_window": 8},
        "moe": {"num_experts": 4},
        "embedding": {"tied": True},
        "position_encoding": "alibi",
        "numerics": {"dtype": "bfloat16", "remat": "dots"},
    },
}


def version() -> str:
    """The minor version of jax: programs change with it."""
    return ".".join(jax.__version__.split(".")[:2])


def program(values: dict) -> str:
    """Loss and gradients, before any optimization; locations and the caller's name left out."""
    config = ModelConfig.from_dict({"vocab_size": 32, "num_layers": 2, "d_model": 32, **values})
    model = Transformer(config)
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "targets"), ids)
    batch["loss_weights"] = jax.ShapeDtypeStruct((2, 16), jnp.float32)

    def loss(params, batch):
        total, (_, experts) = loss_sums(model, LossSpec(), params, batch)
        return total + experts

    lowered = jax.jit(jax.value_and_grad(loss)).lower(abstract_params(model), batch)
    return lowered.as_text()


def fingerprints() -> dict[str, str]:
    """SHA-256 of each model's program."""
    return {n: hashlib.sha256(program(v).encode()).hexdigest() for n, v in MODELS.items()}


if __name__ == "__main__":
    found = {version(): fingerprints()}
    print(json.dumps(found))
    if "--update" in sys.argv:
        stored = json.loads(STORED.read_text()) if STORED.exists() else {}
        STORED.write_text(json.dumps(stored | found, indent=1, sort_keys=True) + "\n")
