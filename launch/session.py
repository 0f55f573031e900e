"""From a run's config to a trained model: tokenizer, data, model, loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlm.checkpoints import local_folder
from jaxlm.data.loader import Loader, open_loader
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.model.transformer import Transformer
from jaxlm.training.loop import TrainResult, train
from jaxlm.training.run import RunConfig


@dataclasses.dataclass(frozen=True)
class Session:
    """A run and what it used."""

    model: Transformer
    tokenizer: Tokenizer
    loader: Loader
    result: TrainResult


def run_training(
    run: RunConfig,
    workdir: str | Path,
    description: str,
    allow_config_change: bool,
    cache: str | Path | None = None,
) -> Session:
    """Prepares the data (kept in `cache`, by default in the workdir) and trains."""
    run.check_model()
    workdir = local_folder(workdir)
    cache = workdir / "data" if cache is None else Path(cache)
    loader, tokenizer = open_loader(run.data, cache)
    model = Transformer(run.model_config(tokenizer.vocab_size))
    result = train(
        run,
        model,
        tokenizer,
        loader,
        workdir,
        description=description,
        allow_config_change=allow_config_change,
    )
    return Session(model, tokenizer, loader, result)
