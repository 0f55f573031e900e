"""Open what training left behind, here or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoints import restore
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.interop.read import is_gguf, is_hub_folder, read_gguf, read_hub_folder
from jaxlm.model.config import ModelConfig
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from jaxlm.training.loop import CHECKPOINTS, DEFAULT_RUN


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
        allowed = "the --workdir of a training run, a Hugging Face folder, a .gguf file"
        raise FileNotFoundError(f"{folder} {found}; allowed: {allowed}")
    return folder


def load(path: str | Path, step: int | None = None) -> tuple[Transformer, Any, Tokenizer]:
    """The model, its parameters and its tokenizer.

    A run that kept an average of its parameters (`train.ema_decay`) gives that average.

    Args:
        path: the workdir of a run, or of a comparison (its first run is loaded); a Hugging Face
            folder (config.json, safetensors, tokenizer.json); or a GGUF file.
        step: of a workdir; None: the newest good checkpoint.

    Returns:
        (model, params, tokenizer); params is a nested dict of arrays.

    Raises:
        FileNotFoundError: none of these, a missing file, or no good checkpoint in a workdir.
        ValueError: a damaged file, or an architecture that is not known.
    """
    if is_gguf(Path(path)):
        return read_gguf(Path(path))
    if is_hub_folder(Path(path)) and not is_workdir(Path(path)):
        return read_hub_folder(Path(path))
    folder = run_folder(path)
    restored = restore(folder / CHECKPOINTS, step=step, prefix=("ema", "params"))
    model = Transformer(ModelConfig.from_dict(restored.metadata["model"]))
    params = jax.tree.map(
        lambda x, like: x.astype(like.dtype), restored.state, abstract_params(model)
    )
    return model, params, load_tokenizer(str(restored.folder / "tokenizer"))
