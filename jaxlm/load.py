"""Open what training left behind, here or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.adapters.lora import adapted_shardings, add_adapters, is_learned, merge_adapters
from jaxlm.adapters.quantize import check_kind, quantize_params
from jaxlm.checkpoints import restore
from jaxlm.checkpoints.config_file import CONFIG
from jaxlm.config import build
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.interop.hub import fetch, is_hub_name
from jaxlm.interop.read import Checkpoint, open_gguf, open_hub_folder, with_numerics
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import Model, abstract_params, parameter_shardings
from jaxlm.model.partition import combine, split
from jaxlm.model.transformer import Transformer
from jaxlm.training.finetune import FinetuneConfig
from jaxlm.training.workdir import CHECKPOINTS, DEFAULT_RUN, TOKENIZER


def is_workdir(path: Path) -> bool:
    """Whether it is the folder of a run or of a comparison."""
    return (path / CHECKPOINTS).is_dir() or (path / DEFAULT_RUN).is_file()


def run_folder(path: str | Path) -> Path:
    """The folder of one run: `path` itself, or the default run of a comparison.

    Raises:
        FileNotFoundError: no such folder, or neither a run nor a comparison.
    """
    folder = Path(path)
    comparison = (folder / DEFAULT_RUN).is_file()
    if comparison:
        folder = folder / json.loads((folder / DEFAULT_RUN).read_text())["run"]
    if not (folder / CHECKPOINTS).is_dir():
        found = "is not a jaxlm workdir (it has no checkpoints)" if folder.exists() else "is absent"
        if comparison:
            found = "is the comparison's first run and has no checkpoint yet"
        allowed = "the --workdir of a training run, a Hugging Face folder, a .gguf file, owner/name"
        raise FileNotFoundError(f"{folder} {found}; allowed: {allowed}")
    return folder


def open_foreign(path: str | Path) -> Checkpoint | None:
    """A Hugging Face folder, a GGUF file, or a model of the hub's; None: it is none of these.

    Raises:
        ValueError: a damaged file, or an architecture that is not known.
        FileNotFoundError: a missing file; a model that neither this machine nor the hub has.
    """
    here = Path(path)
    if here.suffix.lower() == ".gguf":
        if not here.is_file():
            found = "is a folder" if here.is_dir() else "is absent"
            raise FileNotFoundError(f"{path} {found}; allowed: a .gguf file")
        return open_gguf(here)
    if is_hub_name(here):
        here = fetch(str(path))
    if (here / "config.json").is_file() and not is_workdir(here):
        return open_hub_folder(here)
    return None


def open_checkpoint(path: str | Path) -> tuple[ModelConfig | EncoderDecoderConfig, Tokenizer]:
    """The config and the tokenizer that `load` gives, without the parameters.

    Raises:
        FileNotFoundError: nothing to load is there.
        ValueError: a damaged file, or an architecture that is not known.
    """
    checkpoint = open_foreign(path)
    if checkpoint is not None:
        return checkpoint.config, checkpoint.tokenizer
    folder = run_folder(path)
    return load_config(folder), load_tokenizer(str(folder / TOKENIZER))


def load_config(path: str | Path) -> ModelConfig | EncoderDecoderConfig:
    """The model's config, without its parameters; `path` as in `load`.

    Raises:
        FileNotFoundError: nothing to load is there.
        ValueError: a damaged file, or an architecture that is not known.
    """
    checkpoint = open_foreign(path)
    if checkpoint is not None:
        return checkpoint.config
    text = (run_folder(path) / CONFIG).read_text()
    return ModelConfig.from_dict(json.loads(text)["model"])


def load(
    path: str | Path,
    step: int | None = None,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    unroll: bool = False,
    quantize: str | None = None,
) -> tuple[Model, Any, Tokenizer]:
    """The model, its parameters and its tokenizer.

    A run that kept an average of its parameters (`train.ema_decay`) gives that average. A run that
    learned an adapter gives the checkpoint it began with, which must still be there, and the
    adapter beside it; `jaxlm.adapters.merge_adapters` makes them one.

    Args:
        path: the workdir of a run, or of a comparison (its first run is loaded); a Hugging Face
            folder (config.json, safetensors, tokenizer.json); a GGUF file; or the name of a hub's
            model, "owner/name" or "owner/name@revision".
        step: of a workdir; None: the newest good checkpoint.
        dtype: of activations; None: the run's, or the dtype that the parameters are stored in.
        param_dtype: of parameters; None: as they are stored, quantized ones in float32.
        mesh: over which the parameters are cut (`jaxlm.sharding.mesh`), one tensor after the other;
            None: the default device holds them all.
        unroll: layers apart in place of one loop over stacked ones (`jaxlm.model.layouts`): on a
            CPU a token is decoded in half the time, and a program takes longer to compile.
        quantize: "int8" or "int4": every projection's matrix, the embedding and the head
            (`jaxlm.adapters.quantize`), after all is loaded; None: as they are.

    Returns:
        (model, params, tokenizer); params is a nested dict of arrays.

    Raises:
        FileNotFoundError: none of these, a missing file, or no good checkpoint in a workdir.
        ValueError: a damaged file, or an architecture that is not known.
    """
    if quantize is not None:
        check_kind(quantize)
    checkpoint = open_foreign(path)
    if checkpoint is not None:
        model, params = checkpoint.read(dtype, param_dtype, mesh, unroll)
        tokenizer = checkpoint.tokenizer
    else:
        model, params, tokenizer = _load_run(path, step, dtype, param_dtype, mesh)
        if unroll and model.config.numerics.scan_layers:
            params = unroll_layers(model.config, params)
            model = Transformer(with_numerics(model.config, scan_layers=False))
    if quantize is not None:
        params = quantize_params(params, quantize, tables=True)
    return model, params, tokenizer


def _load_run(
    path: str | Path,
    step: int | None,
    dtype: str | None,
    param_dtype: str | None,
    mesh: Mesh | None,
) -> tuple[Transformer, Any, Tokenizer]:
    """`load` of a workdir."""
    folder = run_folder(path)
    restored = restore(folder / CHECKPOINTS, step=step, prefix=("ema", "params"))
    config = ModelConfig.from_dict(restored.metadata["model"])
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    config = with_numerics(config, **{n: value for n, value in dtypes.items() if value is not None})
    model = Transformer(config)
    tokenizer = load_tokenizer(str(restored.folder / TOKENIZER))
    finetune = build(FinetuneConfig, restored.metadata.get("finetune") or {}, "finetune")
    if finetune.adapter is not None:
        params = _adapted(model, finetune, mesh, restored.state)
    else:
        params = jax.tree.map(
            lambda x, like, place: jax.device_put(x.astype(like.dtype), place),
            restored.state,
            abstract_params(model),
            parameter_shardings(model, mesh),
        )
    return model, params, tokenizer


def finetune_of(path: str | Path) -> FinetuneConfig:
    """What a run's workdir says that it began with; `checkpoint` is None for all else."""
    if not is_workdir(Path(path)):
        return FinetuneConfig()
    settings = json.loads((run_folder(path) / CONFIG).read_text())
    return build(FinetuneConfig, settings.get("finetune") or {}, "finetune")


def fresh_adapter(
    model: Transformer, config: FinetuneConfig, mesh: Mesh | None, seed: int = 0
) -> Any:
    """The parameters that a run with an adapter begins with.

    Args:
        model: the checkpoint's, or one with the same parameters.
        config: checkpoint and adapter.
        mesh: as in `load`.
        seed: of the adapter.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: the adapter's targets fit no projection.
    """
    adapter = config.adapter
    assert adapter is not None

    def added(params: Any) -> Any:
        params = params if config.quantize is None else quantize_params(params, config.quantize)
        return add_adapters(model, params, adapter, seed)

    params = base_params(model, config, mesh)
    places = adapted_shardings(model, mesh, jax.eval_shape(added, params))
    return jax.jit(added, out_shardings=places, donate_argnums=0)(params)


def base_params(model: Transformer, config: FinetuneConfig, mesh: Mesh | None) -> Any:
    """The checkpoint's parameters in the model's dtype; an adapter of it is merged."""
    assert config.checkpoint is not None
    dtype = model.config.numerics.param_dtype
    _, params, _ = load(config.checkpoint, config.step, param_dtype=dtype, mesh=mesh)
    return merge_adapters(params)


def _adapted(model: Transformer, config: FinetuneConfig, mesh: Mesh | None, learned: Any) -> Any:
    """A run's adapter on what it adapts."""
    fresh, frozen = split(fresh_adapter(model, config, mesh), is_learned)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), learned, fresh)
    return combine(frozen, placed)
