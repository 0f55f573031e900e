"""Writes tests/checkpoints/format_1: python -m tests.checkpoints.make_format_1

It was run once, when the format was frozen. Run again it would write what today's code writes,
which is another test: a new format gets a script and a folder of its own.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints import Saver

FOLDER = Path(__file__).parent / "format_1"
METADATA = {"model": {"num_layers": 2}, "tokenizer": "bytes"}
FILES = {"tokenizer/tokenizer.json": b'{"kind": "bytes"}\n'}


def fixed_state() -> dict:
    """A matrix, a dtype that NumPy lacks, a typed key and a number."""
    return {
        "params": {
            "kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
            "scale": jnp.asarray([1.5, -0.0, 3e38], jnp.bfloat16),
        },
        "rng": jax.random.key(7),
        "step": np.asarray(30, np.int32),
    }


if __name__ == "__main__":
    with Saver(FOLDER) as saver:
        saver.save(30, fixed_state(), METADATA, FILES)
