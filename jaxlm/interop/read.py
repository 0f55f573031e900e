"""A checkpoint of another library's as a jaxlm model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from jaxlm.data.tokenizers import HuggingFace, Tokenizer, load_tokenizer
from jaxlm.interop import families
from jaxlm.interop.family import Family
from jaxlm.interop.fields import read_fields
from jaxlm.interop.gguf_file import GGUFFile
from jaxlm.interop.gguf_tokenizer import tokenizer_json
from jaxlm.interop.hub_config import HubConfig
from jaxlm.interop.rows import Row
from jaxlm.interop.safetensors_folder import SafetensorsFolder
from jaxlm.interop.tensors import Tensors, read_params, stored_dtype
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import Transformer


def is_gguf(path: Path) -> bool:
    """Whether `path` is named as a GGUF file."""
    return path.suffix == ".gguf"


def is_hub_folder(path: Path) -> bool:
    """Whether `path` is a folder as on the Hugging Face hub."""
    return (path / "config.json").is_file()


@dataclasses.dataclass(frozen=True)
class Placement:
    """How parameters are kept.

    Attributes:
        dtype: of activations; None: the parameters' own.
        param_dtype: of parameters; None: as they are stored, quantized ones in float32.
        mesh: over which they are cut; None: the default device holds them all.
    """

    dtype: str | None = None
    param_dtype: str | None = None
    mesh: Mesh | None = None


def read_gguf(path: Path, placement: Placement) -> tuple[Transformer, Any, Tokenizer]:
    """The model, its parameters and its tokenizer from a GGUF file.

    Raises:
        ValueError: damaged, or an architecture, tensor or tokenizer that is not known.
    """
    file = GGUFFile(path)
    family, config = _config(file.config, str(path))
    text, tokenizer_config = tokenizer_json(file.metadata, str(path))
    tokenizer = HuggingFace(text.encode(), tokenizer_config, str(path))
    _check_vocabulary(tokenizer, config)
    rows = family.rows(config)
    return *_read(config, rows, file.tensors(rows), placement), tokenizer


def read_hub_folder(folder: Path, placement: Placement) -> tuple[Transformer, Any, Tokenizer]:
    """The model, its parameters and its tokenizer from config.json, safetensors, tokenizer.json.

    Raises:
        ValueError: damaged, or an architecture, tensor or tokenizer that is not known.
        FileNotFoundError: a file is missing.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, config = _config(values, str(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder))
    _check_vocabulary(tokenizer, config)
    rows = family.rows(config)
    prefix = rows[0].theirs.split(".")[0] + "."
    return *_read(config, rows, SafetensorsFolder(folder, prefix), placement), tokenizer


def _config(values: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise ValueError(f"{where}: quantized by {method}; allowed: float weights, or GGUF")
    hub = HubConfig(values, where)
    (architecture, *_) = values.get("architectures") or ["none"]
    family = families.find(architecture, where)
    config = read_fields(family.fields, hub)
    if hub.unread:
        logging.warning("%s: not understood: %s", where, ", ".join(sorted(hub.unread)))
    return family, config


def _read(
    config: ModelConfig, rows: list[Row], tensors: Tensors, placement: Placement
) -> tuple[Transformer, Any]:
    param_dtype = placement.param_dtype or stored_dtype(tensors)
    param_dtype = "float32" if param_dtype == "float64" else param_dtype
    dtype = placement.dtype or param_dtype
    numerics = dataclasses.replace(config.numerics, dtype=dtype, param_dtype=param_dtype)
    model = Transformer(config.replace(numerics=numerics))
    return model, read_params(tensors, model, rows, placement.mesh)


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    size = config.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"{tokenizer.name}: vocab_size={tokenizer.vocab_size}; "
            f"allowed: at most the model's {size}"
        )
