"""Programs of a run as they go to a pod, by shapes alone: for launch.aot.child."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import caches
from jaxlm.caches.kind import KVCache
from jaxlm.caches.on_mesh import cache_specs
from jaxlm.caches.rows import round_up
from jaxlm.decoding.engine import decode, prefill
from jaxlm.decoding.request import STOP_TOKENS
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.state import DecodeState, begin
from jaxlm.model.config import ModelConfig
from jaxlm.model.parameters import placed_params
from jaxlm.model.transformer import Transformer
from jaxlm.sharding.mesh import batch_sharding, dividing_spec
from jaxlm.training.loop import compile_step
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.run import RunConfig
from jaxlm.training.state import abstract_state
from jaxlm.training.step import NextToken, loss_spec, make_train_step

NEW_TOKENS = 128  # that a cache has room for behind its prompts
BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32} | {
    "segment_ids": jnp.int32,
    "loss_weights": jnp.float32,
}


def train_step(mesh: Mesh, run: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step of `launch.train`, and the shapes of (state, batch, frozen)."""
    config = RunConfig.from_dict(run)
    model = Transformer(config.model_config(tokenizer_vocab_size=1))
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = abstract_state(placed_params(model, mesh), optimizer, config.train, mesh)
    objective = NextToken(model, loss_spec(model.config, config.train))
    step = compile_step(make_train_step(model, optimizer, config.train, objective), state)
    size = config.data.batch_size, config.data.sequence_length
    rows = batch_sharding(mesh, *size)
    batch = {n: jax.ShapeDtypeStruct(size, dtype, sharding=rows) for n, dtype in BATCH.items()}
    return step, (state, batch, {})


def prefill_prompts(
    mesh: Mesh, run: Mapping[str, Any], rows: int, length: int, cache: str
) -> tuple[Any, tuple[Any, ...]]:
    """What reads prompts of `length` tokens in `jaxlm.generate`, and its arguments, static ones
    too.
    """
    model = Transformer(decoding_config(run))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    prompt = _by_rows(mesh, (tokens, jax.ShapeDtypeStruct((rows,), jnp.int32)))
    sampling, stops = _sampling(mesh, rows)
    empty = _by_parts(mesh, _empty(model, rows, length, cache))
    given = (model, placed_params(model, mesh), prompt, empty, NEW_TOKENS, sampling, stops)
    return prefill, given


def decode_step(
    mesh: Mesh, run: Mapping[str, Any], rows: int, length: int, cache: str
) -> tuple[Any, tuple[Any, ...]]:
    """The loop of `jaxlm.generate` behind such prompts, and its arguments, static ones too."""
    _, (model, params, prompt, empty, *_) = prefill_prompts(mesh, run, rows, length, cache)
    sampling, stops = _sampling(mesh, rows)

    def begun() -> DecodeState:
        logits = jnp.zeros((rows, model.config.vocab_size), model.config.numerics.dtype)
        there = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), prompt)
        chosen, none = Sampling.make(rows), jnp.zeros(stops.shape, stops.dtype)
        held = _empty(model, rows, length, cache)
        return begin(logits, there, held, chosen, none, NEW_TOKENS, 0, None)

    state = dataclasses.replace(_by_rows(mesh, jax.eval_shape(begun)), cache=empty)
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return decode, (model, params, state, until, sampling, stops)


def decoding_config(run: Mapping[str, Any]) -> ModelConfig:
    """Of a run, with parameters in the dtype that it computes in, as a model is served."""
    config = RunConfig.from_dict(run).model_config(tokenizer_vocab_size=1)
    numerics = dataclasses.replace(config.numerics, param_dtype=config.numerics.dtype)
    return dataclasses.replace(config, numerics=numerics)


def _empty(model: Transformer, rows: int, length: int, cache: str) -> KVCache:
    """For such prompts and what is drawn after them."""
    kind, config = caches.parse(cache), model.config
    return jax.eval_shape(lambda: kind.init(config, rows, round_up(length + NEW_TOKENS, 8)))


def _sampling(mesh: Mesh, rows: int) -> tuple[Any, Any]:
    """Greedy, and without stop tokens."""
    stops = jax.ShapeDtypeStruct(
        (STOP_TOKENS,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    return _by_rows(mesh, jax.eval_shape(lambda: Sampling.make(rows))), stops


def _by_rows(mesh: Mesh, shapes: Any) -> Any:
    """Shapes of arrays whose first axis is a batch's."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, dividing_spec(mesh, ("batch",), x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, shapes)


def _by_parts(mesh: Mesh, cache: KVCache) -> Any:
    """A cache as `jaxlm.caches.on_mesh` lays it out."""

    def placed(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, cache, cache_specs(mesh.abstract_mesh, cache))
