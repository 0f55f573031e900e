"""A jaxlm model as a folder that transformers, vLLM and others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxlm.data.optional import optional
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.interop import families
from jaxlm.interop.family import Family
from jaxlm.interop.fields import write_fields
from jaxlm.interop.safetensors_folder import INDEX, WHOLE
from jaxlm.interop.tensors import Place, flatten, places
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.model.parameters import Model

MAX_SHARD_BYTES = 5_000_000_000


def write_hub_folder(
    folder: str | Path,
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    architecture: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Writes config.json, generation_config.json, safetensors and the tokenizer's files.

    Parameters keep their dtype and their bits: what `jaxlm.load` reads back is equal. One file's
    tensors are on the host at a time.

    Args:
        folder: absent, or empty.
        model: its config must be one that an architecture of the hub's can say.
        params: nested dict of arrays.
        tokenizer: of the model.
        architecture: such as "LlamaForCausalLM"; None: the first that can say the config.
        max_shard_bytes: of one safetensors file; a larger tensor has one of its own.

    Returns:
        The architecture.

    Raises:
        ValueError: no architecture, or not this one, can say the config; the field that is in the
            way is named.
        FileExistsError: the folder holds something.
    """
    folder = Path(folder)
    family, keys = check_writable(folder, model.config, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    _write_shards(
        folder, flatten(params), places(model.config, family.rows(model.config)), max_shard_bytes
    )
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
    write_json(folder / "generation_config.json", ends)
    about = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        "torch_dtype": model.config.numerics.param_dtype,
        **ends,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None,  # the architectures' own may lie outside of the vocabulary
    }
    # Last: a folder with a config.json is whole.
    write_json(folder / "config.json", about | keys)
    return family.architectures[0]


def check_writable(
    folder: Path, config: ModelConfig | EncoderDecoderConfig, architecture: str | None
) -> tuple[Family, dict[str, Any]]:
    """What `describe` gives, where `write_hub_folder` will write; errors as there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds files; allowed: a folder that is absent or empty")
    return describe(config, architecture)


def describe(
    config: ModelConfig | EncoderDecoderConfig, architecture: str | None
) -> tuple[Family, dict[str, Any]]:
    """The family that a model is written as, and the keys of its config.json.

    Raises:
        ValueError: none can say the config, or not the one that is asked for.
    """
    if architecture is not None:
        family = families.find(architecture, "architecture")
        try:
            return family, _keys(family, config)
        except ValueError as error:
            raise ValueError(f"{architecture} has no model like this: {error}") from error
    reasons: dict[str, list[str]] = {}
    for family in families.FAMILIES:
        try:
            return family, _keys(family, config)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(family.architectures[0])
    usual = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
    text = "; ".join(f"{', '.join(names)}: {error}" for error, names in usual)
    raise ValueError(f"no architecture of the hub's has a model like this: {text}")


def _keys(family: Family, config: ModelConfig | EncoderDecoderConfig) -> dict[str, Any]:
    if not isinstance(config, family.config):
        raise ValueError(f"{type(config).__name__}; allowed: {family.config.__name__}")
    return write_fields(family.fields, config, family.absent)


def _write_shards(
    folder: Path, params: dict[str, Array], found: list[Place], max_bytes: int
) -> None:
    """The tensors, in files of at most `max_bytes`, and an index if there are several."""
    sizes = [_bytes_of(params, place) for place in found]
    shards: list[list[Place]] = [[]]
    full = 0
    for place, size in zip(found, sizes, strict=True):
        if shards[-1] and full + size > max_bytes:
            shards.append([])
            full = 0
        shards[-1].append(place)
        full += size
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = WHOLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {place.name: _tensor(params, place) for place in shard}
        write_tensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})


def _bytes_of(params: dict[str, Array], place: Place) -> int:
    arrays = [params[path] for path in place.paths]
    return sum(int(np.prod(x.shape[len(place.at) :])) * x.dtype.itemsize for x in arrays)


def _tensor(params: dict[str, Array], place: Place) -> np.ndarray:
    """One tensor, on the host."""
    parts = [np.asarray(params[path][place.at]) for path in place.paths]
    return np.ascontiguousarray(place.row.to_theirs(parts))


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, which others may read as they may any other file here."""
    path.touch()
    mode = path.stat().st_mode
    optional("safetensors.numpy", str(path)).save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library leaves it to its owner


def write_json(path: Path, values: dict[str, Any]) -> None:
    """As the hub's files are written."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
