"""Where a run's parameters come from: a seed, or a checkpoint with or without an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlm.adapters.lora import is_learned, merge_adapters
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.load import (
    base_digest,
    base_params,
    fresh_adapter,
    open_checkpoint,
    saved_finetune,
)
from jaxlm.model.config import ModelConfig
from jaxlm.model.parameters import (
    abstract_params,
    init_params,
    parameter_shardings,
    placed_params,
)
from jaxlm.model.partition import split
from jaxlm.model.transformer import Transformer
from jaxlm.training.finetune import FinetuneConfig


class Start(NamedTuple):
    """What a run learns, and what it keeps.

    Attributes:
        shapes: of the learned parameters, with shardings.
        make: gives them as they are at step 0.
        frozen: the others, on their devices; empty: there are none.
        digest: SHA-256 of the checkpoint below an adapter, or None.
    """

    shapes: Any
    make: Callable[[], Any]
    frozen: Any
    digest: str | None


def from_seed(model: Transformer, seed: int, mesh: Mesh) -> Start:
    """All of a fresh model."""
    make = jax.jit(lambda: init_params(model, seed), out_shardings=parameter_shardings(model, mesh))
    return Start(placed_params(model, mesh), make, {}, None)


def from_checkpoint(model: Transformer, config: FinetuneConfig, seed: int, mesh: Mesh) -> Start:
    """A checkpoint's parameters, or a fresh adapter of them; `model` is `finetuned_config`'s.

    Raises:
        ValueError: no projection has a name that the adapter's targets fit.
        FileNotFoundError: the checkpoint is not there any more.
    """
    if config.adapter is None:
        make = lambda: merge_adapters(base_params(model, config, mesh))  # noqa: E731
        return Start(placed_params(model, mesh), make, {}, None)
    base = base_params(model, config, mesh)
    digest = base_digest(base)
    learned, frozen = split(fresh_adapter(model, base, config, mesh, seed), is_learned)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), learned
    )
    return Start(shapes, lambda: learned, frozen, digest)


def open_base(
    config: FinetuneConfig, workdir: Path
) -> tuple[FinetuneConfig, ModelConfig, Tokenizer]:
    """The config with its path made absolute and its step named, the checkpoint's model and
    tokenizer.

    A step of None becomes the one that the run in `workdir` began with, if there is such a run,
    whatever the checkpoint's own run has saved since; else the newest good one.

    The parameters' dtype is float32 where all are learned, whatever they are stored as: small
    updates of less vanish. The activations' is the stored one.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, not known, or no decoder.
    """
    assert config.checkpoint is not None
    path = Path(config.checkpoint)
    if path.exists():
        config = dataclasses.replace(config, checkpoint=str(path.resolve()))
    saved = saved_finetune(workdir)
    if config.step is None and saved.checkpoint == config.checkpoint:
        config = dataclasses.replace(config, step=saved.step)
    base, tokenizer, step = open_checkpoint(path, config.step)
    config = dataclasses.replace(config, step=step)
    if not isinstance(base, ModelConfig) or base.sees_ahead:
        raise ValueError(
            f"finetune: checkpoint={config.checkpoint!r} does not predict next tokens; allowed: a "
            "decoder"
        )
    if config.adapter is None:
        numerics = dataclasses.replace(base.numerics, param_dtype="float32")
        base = base.replace(numerics=numerics)
    return config, base, tokenizer


def check_same_parameters(base: ModelConfig, changed: ModelConfig) -> None:
    """Raises ValueError for a config whose parameters are not the checkpoint's."""

    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(Transformer(config)))
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    before, after = shapes(base), shapes(changed)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise ValueError(
                f"model: with these fields {name} is {list(after.get(name, ['absent']))}; allowed: "
                f"{list(before.get(name, ['absent']))}, as in the checkpoint"
            )
