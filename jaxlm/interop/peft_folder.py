"""A jaxlm adapter as a folder that peft loads: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import every_projection, is_learned
from jaxlm.interop.family import Family
from jaxlm.interop.tensors import Place, flatten, places
from jaxlm.interop.write import check_writable, write_json, write_tensors
from jaxlm.model.config import ModelConfig
from jaxlm.model.low_rank import LORA
from jaxlm.model.partition import split
from jaxlm.model.transformer import Transformer

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"


def write_peft_folder(
    folder: str | Path,
    model: Transformer,
    params: Any,
    adapter: AdapterConfig | None,
    base: str,
    architecture: str | None = None,
) -> list[str]:
    """Writes the adapters of `params`, in float32, under the names of the hub's architecture.

    Args:
        folder: absent, or empty.
        model: its config must be one that an architecture of the hub's can say.
        params: with adapters beside the matrices.
        adapter: what they were made by, as `jaxlm.load.finetune_of` tells; None: there is none.
        base: name or path of the model that the adapter belongs to, for peft.
        architecture: such as "LlamaForCausalLM"; None: the first that can say the config.

    Returns:
        The names of the adapted modules, as peft's target_modules.

    Raises:
        ValueError: no adapter; or one of a matrix that this architecture keeps with others in one
            tensor; or no architecture can say the config.
        FileExistsError: the folder holds something.
    """
    folder = Path(folder)
    family, _ = check_writable(folder, model.config, architecture)
    if adapter is None or not split(params, is_learned)[0]:
        raise ValueError("params have no adapter; allowed: those of a run with finetune.adapter")
    if not isinstance(model.config, ModelConfig):
        raise ValueError(f"{family.architectures[0]}; allowed: a decoder")
    tensors, about = _translated(model, family, flatten(params), adapter)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / CONFIG, about | {"base_model_name_or_path": base})
    return about["target_modules"]


def _translated(
    model: Transformer, family: Family, arrays: Mapping[str, Any], adapter: AdapterConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors by peft's names, and its config."""
    inputs = {"/".join(t.path): t.last - t.first for t in every_projection(model)}
    tensors: dict[str, np.ndarray] = {}
    modules, others, turned = set(), set(), set()
    for place in places(model.config, family.rows(model.config)):
        paths = [p.removesuffix("/kernel") for p in place.paths]
        module = place.name.removesuffix(".weight")
        name = ".".join(module.split(".")[-2:])
        if not any(f"{p}/{LORA}/a" in arrays for p in paths):
            others.add(name)
            continue
        (path,) = _alone(place, paths)
        lora = {
            n: np.asarray(arrays[f"{path}/{LORA}/{n}"][place.at], np.float32)
            for n in ("a", "b", "magnitude")
            if f"{path}/{LORA}/{n}" in arrays
        }
        tensors |= _peft_tensors(f"{PREFIX}{module}", lora, inputs[path])
        modules.add(name)
        first = place.row.layout.split(" -> ")[1].split()[0]
        turned.add(place.row.layout.lstrip("(").startswith(first))
    (inputs_first,) = turned
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": adapter.dora,
        "target_modules": _shortest(modules, others),
        "fan_in_fan_out": inputs_first,
        "inference_mode": True,
    }


def _shortest(modules: set[str], others: set[str]) -> list[str]:
    """Ends of names that fit these modules and none of the others: q_proj, or attn.c_proj."""
    taken = {name.rpartition(".")[2] for name in others}
    ends = {name: name.rpartition(".")[2] for name in modules}
    return sorted({name if end in taken else end for name, end in ends.items()})


def _alone(place: Place, paths: list[str]) -> list[str]:
    if len(paths) > 1:
        raise ValueError(
            f"{place.name} holds {', '.join(p.rpartition('/')[2] for p in paths)} in one matrix; "
            "allowed: adapters of matrices that the architecture keeps apart; merge this one "
            "(launch.convert without --adapter)"
        )
    return paths


def _peft_tensors(
    module: str, lora: Mapping[str, np.ndarray], inputs: int
) -> dict[str, np.ndarray]:
    """The adapter of one layer's matrix: a [*inputs, rank], b [rank, *outputs]."""
    a, b = lora["a"], lora["b"]
    rank = b.shape[0]
    made: dict[str, np.ndarray] = {
        f"{module}.lora_A.weight": a.reshape(math.prod(a.shape[:inputs]), rank).T,
        f"{module}.lora_B.weight": b.reshape(rank, -1).T,
    }
    if "magnitude" in lora:
        made[f"{module}.lora_magnitude_vector"] = lora["magnitude"].reshape(-1)
    return {name: np.ascontiguousarray(x) for name, x in made.items()}
