"""A checkpoint of another library's as a jaxlm model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import logging

from jaxlm.data.tokenizers import HuggingFace, Tokenizer, load_tokenizer
from jaxlm.interop import families
from jaxlm.interop.family import Family, HubConfig
from jaxlm.interop.gguf_file import GGUFFile
from jaxlm.interop.gguf_tokenizer import tokenizer_json
from jaxlm.interop.safetensors_folder import SafetensorsFolder
from jaxlm.interop.tensors import read_params
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import Transformer


def is_gguf(path: Path) -> bool:
    """Whether `path` is named as a GGUF file."""
    return path.suffix == ".gguf"


def is_hub_folder(path: Path) -> bool:
    """Whether `path` is a folder as on the Hugging Face hub."""
    return (path / "config.json").is_file()


def read_gguf(path: Path) -> tuple[Transformer, Any, Tokenizer]:
    """The model, its parameters and its tokenizer from a GGUF file.

    Raises:
        ValueError: damaged, or an architecture, tensor or tokenizer that is not known.
    """
    file = GGUFFile(path)
    family, model = _model(file.config, str(path))
    text, tokenizer_config = tokenizer_json(file.metadata, str(path))
    tokenizer = HuggingFace(text.encode(), tokenizer_config, str(path))
    _check_vocabulary(tokenizer, model)
    rows = family.rows(model.config)
    return model, read_params(file.tensors(rows), model, rows), tokenizer


def read_hub_folder(folder: Path) -> tuple[Transformer, Any, Tokenizer]:
    """The model, its parameters and its tokenizer from config.json, safetensors, tokenizer.json.

    Raises:
        ValueError: damaged, or an architecture, tensor or tokenizer that is not known.
        FileNotFoundError: a file is missing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, model = _model(config, str(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder))
    _check_vocabulary(tokenizer, model)
    rows = family.rows(model.config)
    prefix = rows[0].theirs.split(".")[0] + "."
    return model, read_params(SafetensorsFolder(folder, prefix), model, rows), tokenizer


def _model(values: dict[str, Any], where: str) -> tuple[Family, Transformer]:
    config = HubConfig(values, where)
    (architecture, *_) = values.get("architectures") or ["none"]
    family = families.find(architecture, where)
    model = Transformer(ModelConfig.from_dict(family.model(config)))
    if config.unread:
        logging.warning("%s: not understood: %s", where, ", ".join(sorted(config.unread)))
    return family, model


def _check_vocabulary(tokenizer: Tokenizer, model: Transformer) -> None:
    size = model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"{tokenizer.name}: vocab_size={tokenizer.vocab_size}; "
            f"allowed: at most the model's {size}"
        )
