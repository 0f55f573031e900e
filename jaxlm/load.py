"""Open what training left behind, here or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.adapters.lora import adapted_shardings, add_adapters, is_learned, merge_adapters
from jaxlm.adapters.quantize import check_kind, quantize_params
from jaxlm.checkpoints import available_steps, restore, tree_digest
from jaxlm.checkpoints.config_file import CONFIG, saved_config
from jaxlm.checkpoints.manifest import check_file_name
from jaxlm.checkpoints.restore import Restored
from jaxlm.config import build
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.interop.hub import fetch, is_hub_name
from jaxlm.interop.peft_folder import CONFIG as PEFT_CONFIG
from jaxlm.interop.read import Checkpoint, open_gguf, open_hub_folder, with_numerics
from jaxlm.model.config import ModelConfig
from jaxlm.model.encoder_decoder import EncoderDecoderConfig
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import Model, abstract_params, model_of, parameter_shardings
from jaxlm.model.partition import combine, split
from jaxlm.model.transformer import Transformer
from jaxlm.training.finetune import FinetuneConfig
from jaxlm.training.workdir import CHECKPOINTS, DEFAULT_RUN, TOKENIZER


def is_workdir(path: Path) -> bool:
    """Whether it is the folder of a run, maybe before its first checkpoint, or of a comparison."""
    folders = (path / CHECKPOINTS, path / TOKENIZER)
    return any(folder.is_dir() for folder in folders) or (path / DEFAULT_RUN).is_file()


def run_folder(path: str | Path) -> Path:
    """The folder of one run: `path` itself, or the default run of a comparison.

    Raises:
        FileNotFoundError: no such folder, or neither a run nor a comparison.
    """
    folder = Path(path)
    comparison = (folder / DEFAULT_RUN).is_file()
    if comparison:
        folder = folder / _default_run(folder / DEFAULT_RUN)
    if not (folder / CHECKPOINTS).is_dir():
        lacks = [name for name in (CHECKPOINTS, CONFIG) if not (folder / name).exists()]
        found = f"has no {' and no '.join(lacks)}"
        if comparison:
            found = "is the comparison's first run and has no checkpoint yet"
        elif not folder.is_dir():
            found = "is a file" if folder.exists() else "is absent"
        elif (folder / TOKENIZER).is_dir():
            found = "is a run that has no checkpoint yet"
        allowed = "the --workdir of a training run, a Hugging Face folder, a .gguf file, owner/name"
        raise FileNotFoundError(f"{folder} {found}; allowed: {allowed}")
    return folder


def _default_run(path: Path) -> str:
    """The run that default.json names."""
    try:
        return check_file_name(str(json.loads(path.read_text())["run"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} names no run ({error}); allowed: {{"run": NAME}} with a run\'s folder in '
            f"{path.parent}"
        ) from error


def open_foreign(path: str | Path) -> Checkpoint | None:
    """A Hugging Face folder, a GGUF file, or a model of the hub's; None: it is none of these.

    Raises:
        ValueError: a damaged file, an architecture that is not known, or an adapter of peft's.
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
    if is_workdir(here):
        return None
    if (here / PEFT_CONFIG).is_file():
        raise ValueError(
            f"{here} holds an adapter of peft's ({PEFT_CONFIG}); allowed: the model that it is "
            "merged into (peft's merge_and_unload and save_pretrained)"
        )
    return open_hub_folder(here) if (here / "config.json").is_file() else None


def open_checkpoint(
    path: str | Path, step: int | None = None
) -> tuple[ModelConfig | EncoderDecoderConfig, Tokenizer, int | None]:
    """The config and the tokenizer that `load` gives, without the parameters, and the step that
    it takes of a workdir (None: it is no workdir).

    A run that began with a step goes on when that is kept no more: then both are the workdir's.

    Raises:
        FileNotFoundError: nothing to load is there.
        ValueError: a damaged file, or an architecture that is not known.
    """
    checkpoint = open_foreign(path)
    if checkpoint is not None:
        return checkpoint.config, checkpoint.tokenizer, step
    folder = run_folder(path)
    if step is not None and step not in available_steps(folder / CHECKPOINTS):
        return load_config(folder), load_tokenizer(str(folder / TOKENIZER)), step
    restored, tokenizer = _restored(folder, step)
    return ModelConfig.from_dict(restored.metadata["model"]), tokenizer, restored.step


def load_config(path: str | Path) -> ModelConfig | EncoderDecoderConfig:
    """The model's config, without its parameters; `path` as in `load`.

    Raises:
        FileNotFoundError: nothing to load is there.
        ValueError: a damaged file, or an architecture that is not known.
    """
    checkpoint = open_foreign(path)
    if checkpoint is not None:
        return checkpoint.config
    folder = run_folder(path)
    settings = saved_config(folder)
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        found = "is absent" if settings is None else "has no model's settings"
        raise ValueError(f"{folder / CONFIG} {found}; restore it, or train into another workdir")
    return ModelConfig.from_dict(settings["model"])


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
    learned an adapter gives the checkpoint it began with, which must still be there and be what it
    was, and the adapter beside it; `jaxlm.adapters.merge_adapters` makes them one.

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
        ValueError: a damaged file, an architecture that is not known, a step of no workdir, or an
            adapter whose checkpoint has changed.
    """
    if quantize is not None:
        check_kind(quantize)
    checkpoint = open_foreign(path)
    if checkpoint is not None:
        if step is not None:
            raise ValueError(f"step={step}; allowed: None with {path}, which is no workdir")
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
    restored, tokenizer = _restored(run_folder(path), step)
    own = config = ModelConfig.from_dict(restored.metadata["model"])
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    config = with_numerics(config, **{n: value for n, value in dtypes.items() if value is not None})
    model = Transformer(config)
    finetune = build(FinetuneConfig, restored.metadata.get("finetune") or {}, "finetune")
    if finetune.adapter is not None:
        params = _adapted(model, Transformer(own), finetune, mesh, restored)
    else:
        params = jax.tree.map(
            lambda x, like, place: jax.device_put(x.astype(like.dtype), place),
            restored.state,
            abstract_params(model),
            parameter_shardings(model, mesh),
        )
    return model, params, tokenizer


def _restored(folder: Path, step: int | None) -> tuple[Restored, Tokenizer]:
    """Parameters of a workdir's step, and its tokenizer: both of a newer step, where a run that
    goes on deleted that one before its tokenizer was read.
    """
    while True:
        restored = restore(folder / CHECKPOINTS, step=step, prefix=("ema", "params"))
        try:
            return restored, load_tokenizer(str(restored.folder / TOKENIZER))
        except Exception:  # whatever a tokenizer's library says of a file that is gone
            if restored.folder.is_dir():
                raise


def finetune_of(path: str | Path) -> FinetuneConfig:
    """What a run's workdir says that it began with; `checkpoint` is None for all else."""
    if not is_workdir(Path(path)):
        return FinetuneConfig()
    return saved_finetune(run_folder(path))


def saved_finetune(workdir: Path) -> FinetuneConfig:
    """The same of a folder that may hold no checkpoint yet, or no run."""
    settings = saved_config(workdir) or {}
    return build(FinetuneConfig, settings.get("finetune") or {}, "finetune")


def base_params(model: Model, config: FinetuneConfig, mesh: Mesh | None) -> Any:
    """The checkpoint's parameters in the model's dtype, with an adapter beside them if it has one.

    Raises:
        FileNotFoundError: the checkpoint is not there.
    """
    assert config.checkpoint is not None
    dtype = model.config.numerics.param_dtype
    return load(config.checkpoint, config.step, param_dtype=dtype, mesh=mesh)[1]


def base_digest(params: Any) -> str:
    """SHA-256 of what `base_params` gives.

    Merged or quantized, they would differ between devices in how they are rounded.
    """
    return tree_digest(params)["whole"]


def fresh_adapter(
    model: Transformer, params: Any, config: FinetuneConfig, mesh: Mesh | None, seed: int = 0
) -> Any:
    """The parameters that a run with an adapter begins with.

    Args:
        model: the checkpoint's, or one with the same parameters, in whose dtype they become.
        params: what `base_params` gives; not usable afterwards.
        config: its adapter and its quantization.
        mesh: as in `load`.
        seed: of the adapter.

    Raises:
        ValueError: the adapter's targets fit no projection.
    """

    def added(params: Any) -> Any:
        return _with_adapter(model, params, config, seed)

    params = merge_adapters(params)
    places = adapted_shardings(model, mesh, jax.eval_shape(added, params))
    return jax.jit(added, out_shardings=places, donate_argnums=0)(params)


def _with_adapter(model: Transformer, params: Any, config: FinetuneConfig, seed: int) -> Any:
    """Plain parameters as they are kept below an adapter, and a fresh one."""
    assert config.adapter is not None
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract_params(model))
    params = params if config.quantize is None else quantize_params(params, config.quantize)
    return add_adapters(model, params, config.adapter, seed)


def loaded_shapes(path: str | Path) -> Any:
    """Shapes and dtypes of the parameters that `load` gives, which are not read.

    Raises:
        FileNotFoundError: nothing to load is there.
        ValueError: a damaged file, or an architecture that is not known.
    """
    model, finetune = model_of(load_config(path)), finetune_of(path)
    plain = abstract_params(model)
    if finetune.adapter is None or not isinstance(model, Transformer):
        return plain
    return jax.eval_shape(lambda params: _with_adapter(model, params, finetune, 0), plain)


def _adapted(
    model: Transformer,
    own: Transformer,
    config: FinetuneConfig,
    mesh: Mesh | None,
    restored: Restored,
) -> Any:
    """A run's adapter on what it adapts; `own` is the run's model, in the dtype it learned in.

    Raises:
        ValueError: what the checkpoint's path leads to is not what the adapter was learned on.
    """
    params = base_params(own, config, mesh)
    digest, wanted = base_digest(params), restored.metadata.get("base")
    if wanted not in (None, digest):
        at = "" if config.step is None else f" of step {config.step}"
        raise ValueError(
            f"finetune: checkpoint={config.checkpoint!r}{at} has the digest {digest}; allowed: "
            f"{wanted}, as when the adapter was learned"
        )
    fresh, frozen = split(fresh_adapter(model, params, config, mesh), is_learned)
    learned = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), restored.state, fresh)
    return combine(frozen, learned)
