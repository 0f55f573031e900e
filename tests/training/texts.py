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
    """Two sources of many short documents, which rows are packed with, and a long held-out one."""
    generator = random.Random(0)
    folder.mkdir(exist_ok=True)

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    for name, count in (("one", 600), ("two", 250)):
        documents = [words(generator.randint(1, 12)) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n\n\n".join(documents))
    (folder / "held_out.txt").write_text(words(300))
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
