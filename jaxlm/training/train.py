"""From a run's config to a trained model: tokenizer, data, model, loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoints import check_known_config, local_folder
from jaxlm.data.loader import Loader, open_loader
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.model.transformer import Transformer
from jaxlm.training.loop import TrainResult, run_loop
from jaxlm.training.run import RunConfig
from jaxlm.training.start import check_same_parameters, open_base
from jaxlm.training.workdir import DEFAULT_RUN


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run and what it used.

    Attributes:
        model: of the run's config, with the tokenizer's vocabulary.
        tokenizer: the config's.
        loader: batches of any step, and the held-out text.
        result: how the run ended.
    """

    model: Transformer
    tokenizer: Tokenizer
    loader: Loader
    result: TrainResult

    @property
    def params(self) -> Any:
        """What is evaluated, and what `jaxlm.load` gives: the averaged parameters if there are
        such, else the last; with an adapter, the adapter and what it adapts.
        """
        return self.result.params


def train(
    run: RunConfig,
    workdir: str | Path,
    *,
    description: str = "train",
    allow_config_change: bool = False,
    cache: str | Path | None = None,
) -> TrainedRun:
    """Prepares the data and trains until `run.train.steps`, or goes on where `workdir` left off.

    Args:
        run: `RunConfig.from_dict(config.to_dict())` of a config file, or built in Python.
        workdir: local folder of checkpoints, metrics and the tokenizer.
        description: in front of the progress bar.
        allow_config_change: go on under another config than the workdir's.
        cache: folder of the tokenized texts; None: in the workdir.

    Raises:
        ValueError: a config, a source or a workdir that won't do.
        ConfigMismatchError, NoCheckpointError: the workdir holds a run of another config or of
            other texts; or checkpoints of which none is good.
        WorkdirLockedError: another process trains in it.
        DivergedError: too many steps in a row without a finite loss.
        SaveError: a checkpoint could not be written; the earlier ones are good.
    """
    workdir = local_folder(workdir)
    if run.compare is not None:
        raise ValueError(
            "compare is set; allowed: None, or launch.train, which trains all that it compares"
        )
    if run.finetune is not None and jax.process_count() > 1:
        # The checkpoint's digest, which a run goes on by, is of arrays that one process holds.
        raise ValueError("finetune is set; allowed with several processes: None")
    if (workdir / DEFAULT_RUN).exists():
        raise ValueError(f"workdir={workdir} holds a comparison; allowed: a run's, or a new one")
    # The vocabulary is the tokenizer's, which may have to be trained first; all else is known now.
    base, given = None, None
    if run.finetune is not None:
        finetune, base, given = open_base(run.finetune, workdir)
        run = dataclasses.replace(run, finetune=finetune)
    config = run.model_config(tokenizer_vocab_size=1, base=base)
    if base is not None:
        check_same_parameters(base, config)
    known = {name: value for name, value in config.to_dict().items() if name != "vocab_size"}
    if not allow_config_change:
        check_known_config(workdir, {**run.to_dict(), "model": known}, run.default_settings())
    loader, tokenizer = open_loader(
        run.data, workdir / "data" if cache is None else cache, tokenizer=given
    )
    _check_kinds(run, loader)
    model = Transformer(run.model_config(tokenizer.vocab_size, base))
    parts, changed = (run, model, tokenizer, loader, workdir), allow_config_change
    result = run_loop(*parts, description=description, allow_config_change=changed)
    return TrainedRun(model, tokenizer, loader, result)


def _check_kinds(run: RunConfig, loader: Loader) -> None:
    """Raises ValueError where pairs of answers meet another objective, or the other way round."""
    wanted = run.finetune is not None and run.finetune.preference_beta is not None
    allowed = "pairs of answers with" if wanted else "no pairs of answers without"
    for source, store in zip(run.data.sources, loader.stores, strict=True):
        if store.pairs != wanted:
            raise ValueError(
                f"data: sources={source.path!r}; allowed: {allowed} finetune.preference_beta"
            )
    for source, store in zip(run.data.held_out, loader.held_out_stores, strict=True):
        if store.pairs:
            raise ValueError(f"data: held_out={source.path!r}; allowed: texts or chats")
