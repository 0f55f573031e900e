"""Texts of made-up sentences, and the run of tests/launch/tiny_config.py over them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from jaxlm.training.loop import TrainResult
from jaxlm.training.run import RunConfig
from jaxlm.training.train import train
from tests.launch import tiny_config

WORDS = ("it", "was", "the", "best", "of", "times", "and", "she", "had", "not", "been", "there")


def write_texts(folder: Path) -> Path:
    generator = random.Random(0)
    folder.mkdir(exist_ok=True)
    for name, count in (("one", 4000), ("two", 1500), ("held_out", 300)):
        (folder / f"{name}.txt").write_text(" ".join(generator.choices(WORDS, k=count)))
    return folder


def tiny_run(texts: Path, **changes: Any) -> RunConfig:
    """The tiny config's run, without experts; names of changes are paths with "__" for the dots."""
    config = tiny_config.get_config(str(texts))
    config.model.moe = None  # compiles in half the time
    for name, value in changes.items():
        *path, last = name.split("__")
        part = config
        for key in path:
            part = part[key]
        part[last] = value
    return RunConfig.from_dict(config.to_dict())


def train_tiny(run: RunConfig, workdir: Path, cache: Path, **options: Any) -> TrainResult:
    return train(run, workdir, cache=cache, **options).result
