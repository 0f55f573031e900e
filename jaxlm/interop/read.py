"""A checkpoint of another library's as a jaxlm model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from jaxlm.config import fits
from jaxlm.data.tokenizers import HuggingFace, Tokenizer, load_tokenizer
from jaxlm.interop import families
from jaxlm.interop.family import Family
from jaxlm.interop.fields import read_fields
from jaxlm.interop.gguf_config import Unshifted, architecture_of, config_json
from jaxlm.interop.gguf_file import GGUFFile
from jaxlm.interop.gguf_rows import gguf_rows
from jaxlm.interop.gguf_tokenizer import stop_ids, tokenizer_json
from jaxlm.interop.hub_config import HubConfig, read_json
from jaxlm.interop.mxfp4 import Unpacked
from jaxlm.interop.own_head import with_own_head
from jaxlm.interop.rows import Row
from jaxlm.interop.safetensors_folder import SafetensorsFolder
from jaxlm.interop.tensors import Tensors, read_params, stored_dtype
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.model.parameters import Model, model_of


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, whose tensors are not read yet.

    Attributes:
        config: of its model, in the dtype that the tensors are stored in (quantized ones are
            float32 here).
        tokenizer: of the model.
        rows: which tensor is which parameter.
        tensors: the file or files.
    """

    config: ModelConfig | EncoderDecoderConfig
    tokenizer: Tokenizer
    rows: list[Row]
    tensors: Tensors

    def read(
        self,
        dtype: str | None,
        param_dtype: str | None,
        mesh: Mesh | None,
        unroll: bool,
    ) -> tuple[Model, Any]:
        """The model and its parameters; see `jaxlm.load`.

        Raises:
            ValueError: a tensor is missing, has another shape or dtype, or is none of the model's.
        """
        param_dtype = param_dtype or self.config.numerics.param_dtype
        dtypes = {"dtype": dtype or param_dtype, "param_dtype": param_dtype}
        model = model_of(with_numerics(self.config, **dtypes, scan_layers=not unroll))
        return model, read_params(self.tensors, model, self.rows, mesh)


def with_numerics(config: Any, **changes: Any) -> Any:
    """The same model with other fields of `NumericsConfig`."""
    if isinstance(config, EncoderDecoderConfig):
        encoder, decoder = (with_numerics(c, **changes) for c in (config.encoder, config.decoder))
        return config.replace(encoder=encoder, decoder=decoder)
    return config.replace(numerics=dataclasses.replace(config.numerics, **changes))


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file.

    Raises:
        ValueError: damaged, or an architecture or tokenizer that is not known.
    """
    file = GGUFFile(path)
    architecture = architecture_of(file)
    family, config = _config(config_json(file, architecture), str(path))
    text, tokenizer_config = tokenizer_json(file.metadata, str(path))
    tokenizer = HuggingFace(text.encode(), tokenizer_config, str(path), stop_ids(file.metadata))
    rows = gguf_rows(family.rows(config), architecture.rows, file.shapes.keys())
    tensors = Unshifted(file) if architecture.shifted else file
    return _checkpoint(config, tokenizer, rows, tensors)


def open_hub_folder(folder: Path) -> Checkpoint:
    """A folder with config.json, safetensors and tokenizer.json.

    Raises:
        ValueError: damaged, or an architecture or tokenizer that is not known.
        FileNotFoundError: a file is missing.
    """
    values = read_json(folder / "config.json")
    tensors = SafetensorsFolder(folder)
    _check_depth(values, folder / "config.json", len(tensors.shapes))
    family, config = _config(values, str(folder / "config.json"), tensors.shapes.keys(), hub=True)
    rows = family.rows(config)
    first, dot, _ = rows[0].theirs.partition(".")
    prefix = first + dot if dot else ""
    tokenizer = load_tokenizer(str(folder))
    unpacked = Unpacked(tensors.under(prefix))
    config = with_own_head(unpacked, family, config)
    return _checkpoint(config, tokenizer, family.rows(config), unpacked)


# Numbers of layers, each of which has a tensor.
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")


def _check_depth(values: dict[str, Any], where: Path, tensors: int) -> None:
    """Before anything is made for every layer."""
    for key in DEPTHS:
        value = values.get(key, 1)
        if value is not None and not (fits(value, int) and 1 <= value <= tensors):
            raise ValueError(
                f"{where}: {key}={value!r}; allowed: at most {tensors}, the number of tensors"
            )


def _check_sizes(config: ModelConfig | EncoderDecoderConfig, tensors: Tensors) -> None:
    """Before anything is made of such a size: every width is an axis of some tensor."""
    if isinstance(config, EncoderDecoderConfig):
        for half in (config.encoder, config.decoder):
            _check_sizes(half, tensors)
        return
    longest = max((n for shape in tensors.shapes.values() for n in shape), default=0)
    sizes = {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "num_heads * head_dim": config.attention.num_heads * config.head_dim,
    }
    for name, size in sizes.items():
        if size > longest:
            allowed = f"at most {longest}, the longest axis of its tensors"
            raise ValueError(f"{tensors.name}: {name}={size}; allowed: {allowed}")


def _checkpoint(
    config: ModelConfig | EncoderDecoderConfig,
    tokenizer: Tokenizer,
    rows: list[Row],
    tensors: Tensors,
) -> Checkpoint:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer.name}: vocab_size={tokenizer.vocab_size}; "
            f"allowed: at most the model's {config.vocab_size}"
        )
    _check_sizes(config, tensors)
    dtype = stored_dtype(tensors)
    config = with_numerics(config, dtype=dtype, param_dtype=dtype)
    return Checkpoint(config, tokenizer, rows, tensors)


def _config(
    values: dict[str, Any], where: str, tensors: Collection[str] = (), hub: bool = False
) -> tuple[Family, Any]:
    """The family and the model's config; keys that are absent mean on the hub what transformers
    takes for them.
    """
    about = HubConfig(values, where)
    method = about.get("quantization_config", {}, dict).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise ValueError(f"{where}: quantized by {method}; allowed: mxfp4, float weights, or GGUF")
    kind = about.get("model_type", "none", str)
    (architecture, *_) = about.get("architectures", [], list) or [kind]
    family = families.find(architecture, where)
    keys = HubConfig(values, where, tensors, family.absent if hub else {})
    keys.unread.discard("quantization_config")
    try:
        config = read_fields(family.fields, keys, family.config)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from error
    if keys.unread:
        logging.warning("%s: not understood: %s", where, ", ".join(sorted(keys.unread)))
    return family, config
