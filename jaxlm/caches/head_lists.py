"""Which kv heads of each layer keep all tokens: checked lists, and the file they are saved in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from jaxlm.model.config import ModelConfig

HeadLists = tuple[tuple[int, ...], ...]


def digest_of(config: ModelConfig) -> str:
    """Hexadecimal SHA-256 of what a model computes: of all of its config but how it is run."""
    values = config.to_dict()
    for name in ("numerics", "dropout", "context_length"):
        del values[name]
    values["attention"].pop("implementation")
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_heads(path: str | os.PathLike[str], heads: Sequence[Sequence[int]], config: ModelConfig):
    """Writes them as JSON, beside the model's digest.

    Raises:
        ValueError: heads that the model has not.
    """
    lists = [list(layer) for layer in check_heads("heads", heads, config)]
    text = json.dumps({"config_sha256": digest_of(config), "heads": lists})
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_heads(path: str | os.PathLike[str], config: ModelConfig) -> HeadLists:
    """What `save_heads` wrote.

    Raises:
        ValueError: no such file, or one of another form or of another model.
    """
    allowed = "a file that jaxlm.caches.head_lists.save_heads wrote"
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        heads, digest = [tuple(layer) for layer in saved["heads"]], saved["config_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"heads={str(path)!r}; allowed: {allowed} ({error})") from error
    found = check_heads(f"{path}: heads", heads, config)
    if digest != digest_of(config):
        raise ValueError(
            f"heads={str(path)!r} is of another model; allowed: {allowed} for this one"
        )
    return found


def check_heads(name: str, heads: Sequence[Sequence[int]], config: ModelConfig) -> HeadLists:
    """Each layer's in ascending order.

    Raises:
        ValueError: not as many lists as layers, or a head that is none.
    """
    K = config.num_kv_heads
    if len(heads) != config.num_layers:
        raise ValueError(
            f"{name} of {len(heads)} layers; allowed: a list for each of the model's "
            f"{config.num_layers} layers"
        )
    for i, layer in enumerate(heads):
        whole = all(isinstance(h, int) and 0 <= h < K for h in layer)
        if not whole or len(set(layer)) < len(layer):
            raise ValueError(
                f"{name} of layer {i}: {tuple(layer)}; allowed: different kv heads, 0 to {K - 1}"
            )
    return tuple(tuple(sorted(layer)) for layer in heads)
