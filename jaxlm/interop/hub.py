"""Models of the Hugging Face hub by name."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.data.optional import optional

NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# What a model is read from; no weights in formats that run code when they are opened.
FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def is_hub_name(path: Path) -> bool:
    """Whether it reads as owner/name and nothing here is called so, nor the owner."""
    return bool(NAME.fullmatch(str(path))) and not path.exists() and not path.parent.exists()


def fetch(name: str) -> Path:
    """The folder of a model, from huggingface_hub's cache or, through it, from the hub.

    Args:
        name: owner/name, and @revision if it is not main.

    Raises:
        FileNotFoundError: no such model, or it is not in the cache and the hub is out of reach.
    """
    hub = optional("huggingface_hub", name)
    model, _, revision = name.partition("@")
    try:
        return Path(hub.snapshot_download(model, revision=revision or None, allow_patterns=FILES))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such file here, and the hub does not give such a model "
            f"({str(error).splitlines()[0]}); allowed: a path, or owner/name once it was fetched "
            "or while the hub is in reach"
        ) from error
