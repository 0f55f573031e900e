"""A whole run as one validated object: the only reader of a run's ConfigDict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging

from jaxlm.attention.all_to_all import check_heads
from jaxlm.attention.context import FORMS
from jaxlm.config import at_least, build, check, check_types, one_of
from jaxlm.data.config import DataConfig
from jaxlm.model.config import ModelConfig
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.training.config import TrainConfig
from jaxlm.training.finetune import FinetuneConfig

# Vocabularies are rounded up to this: matrix units like round numbers, and nobody counts the rest.
VOCABULARY_MULTIPLE = 64


# As `data.tokenizer`: the one of the checkpoint that a run goes on from.
CHECKPOINTS_OWN = "checkpoint"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which steps are kept.

    Attributes:
        every: steps between two saves; the last step is always saved.
        keep_last: newest steps kept.
        keep_every: steps divisible by it are kept for ever; None: none.
    """

    every: int = 500
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        check_types(type(self), vars(self), "checkpoint")
        forever = self.keep_every
        check(
            "checkpoint",
            every=at_least(self.every, 1),
            keep_last=at_least(self.keep_last, 1),
            keep_every=(forever, forever is None or forever >= 1, "None or an integer >= 1"),
        )


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Several position encodings trained alike and drawn in one picture.

    Attributes:
        position_encodings: one run each, in a folder each; all else is bit-identical. The first is
            the one that `jaxlm.load(workdir)` opens.
        also: encodings put on a trained run without training, as "TRAINED + ENCODING":
            "rope + lm_infinite(num_sinks=4)".
        length: of the contexts that loss by position is measured on.
        bucket: positions averaged into one point.
        windows: texts of that length.
        text: held-out source they are cut from.
        prompt: of the sample.
    """

    position_encodings: tuple[str, ...]
    also: tuple[str, ...] = ()
    length: int = 2048
    bucket: int = 64
    windows: int = 8
    text: str = "builtin:austen_valid"
    prompt: str = "Emma was"

    def __post_init__(self):
        check_types(type(self), vars(self), "compare")
        check(
            "compare",
            position_encodings=(
                self.position_encodings,
                len(self.position_encodings) >= 1,
                "at least one",
            ),
            also=(self.also, all(" + " in a for a in self.also), '"TRAINED + ENCODING" each'),
            length=at_least(self.length, 1),
            bucket=at_least(self.bucket, 1),
            windows=at_least(self.windows, 1),
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Model, data, training, mesh and checkpoints of one run.

    With `finetune`, `model` holds only what differs from the checkpoint's model.
    """

    model: Mapping[str, Any]
    data: DataConfig
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    compare: CompareConfig | None = None
    finetune: FinetuneConfig | None = None

    PARTS = {
        "data": DataConfig,
        "train": TrainConfig,
        "checkpoint": CheckpointConfig,
        "mesh": MeshConfig,
        "compare": CompareConfig,
        "finetune": FinetuneConfig,
    }

    def __post_init__(self):
        parts, rows = self.train.microbatches, self.data.batch_size
        allowed = f"a divisor of data.batch_size={rows}"
        check("train", microbatches=(parts, rows % parts == 0, allowed))
        own, tokenizer = self.finetune is None, self.data.tokenizer
        allowed = "any tokenizer, without finetune" if own else "that of the checkpoint"
        check("data", tokenizer=(tokenizer, own == (tokenizer != CHECKPOINTS_OWN), allowed))
        if self.finetune is not None and self.compare is not None:
            raise ValueError("compare is set, and finetune; allowed: one of them")
        self._check_rollback()
        steps, warmup = self.train.steps, self.train.optimizer.warmup_steps
        if warmup >= steps:
            logging.warning(
                "train.optimizer.warmup_steps=%d of %d steps: the rate never comes down",
                warmup,
                steps,
            )

    def _check_rollback(self) -> None:
        """So that among the kept steps there always is one to go back to."""
        rollback, keep = self.train.rollback, self.checkpoint
        if rollback is None:
            return
        allowed = f"at most checkpoint.every={keep.every}, with train.rollback"
        check("train.rollback", skip=(rollback.skip, rollback.skip <= keep.every, allowed))
        allowed = "at least 2, with train.rollback"
        check("checkpoint", keep_last=(keep.keep_last, keep.keep_last >= 2, allowed))

    def to_dict(self) -> dict[str, Any]:
        """All settings but the model's, JSON-able; the comparison is not part of a run."""
        names = ("data", "train", "checkpoint", "mesh") + ("finetune",) * (
            self.finetune is not None
        )
        return {name: dataclasses.asdict(getattr(self, name)) for name in names}

    def default_settings(self) -> dict[str, Any]:
        """What a field stands for that a workdir's config.json lacks, having been written before
        there was such a field: a new field's default is what was done without it.
        """
        parts = {name: dataclasses.asdict(self.PARTS[name]()) for name in self.to_dict()}
        return {**parts, "model": ModelConfig(vocab_size=1).to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From a nested mapping such as `config.to_dict()`.

        Raises:
            ValueError: an unknown field, with the nearest known name; a value that is not allowed.
        """
        return build(cls, values, "config")

    def check_model(self) -> None:
        """Raises ValueError for a model that can't be built, before any data is prepared."""
        self.model_config(tokenizer_vocab_size=1)

    def model_config(
        self, tokenizer_vocab_size: int, base: ModelConfig | None = None
    ) -> ModelConfig:
        """The model's config; a vocab_size of None is the tokenizer's, rounded up.

        Args:
            tokenizer_vocab_size: see there.
            base: the checkpoint's, whose fields count where `model` has none.

        Raises:
            ValueError: a vocabulary smaller than the tokenizer's, or rows longer than the position
                encoding's table.
        """
        values = dict(self.model) if base is None else _replaced(base.to_dict(), _given(self.model))
        if values.get("vocab_size") is None:
            m = VOCABULARY_MULTIPLE
            values["vocab_size"] = -(-tokenizer_vocab_size // m) * m
        if values.get("context_length") is None:
            values["context_length"] = self.data.sequence_length
        config = ModelConfig.from_dict(values)
        if config.vocab_size < tokenizer_vocab_size:
            raise ValueError(
                f"model.vocab_size={config.vocab_size}; allowed: at least the tokenizer's "
                f"{tokenizer_vocab_size}, or None to take it from there"
            )
        check(
            "model.numerics",
            # Optimizers divide by numbers that float16 rounds to 0.
            param_dtype=one_of(config.numerics.param_dtype, "float32", "bfloat16"),
        )
        limit, length = config.encoding.max_length, self.data.sequence_length
        if limit is not None and length > limit:
            raise ValueError(
                f"data.sequence_length={length}; allowed: at most {limit} with "
                f"model.position_encoding={config.encoding}"
            )
        self._check_context(config)
        return config

    def _check_context(self, config: ModelConfig) -> None:
        """What each device of mesh.context gets must be equal, and come out even."""
        form, parts = config.attention.implementation, self.mesh.context
        if form not in FORMS or parts == 1:
            return
        length, allowed = self.data.sequence_length, f"a multiple of 2 × mesh.context = {2 * parts}"
        check("data", sequence_length=(length, length % (2 * parts) == 0, allowed))
        if form == "all_to_all":
            heads, tensor = config.attention.num_heads, self.mesh.tensor
            cut = tensor if config.num_kv_heads % tensor == 0 else 1
            check_heads(heads // cut, config.num_kv_heads // cut, parts)


def _given(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set; None leaves a field as it is."""
    given = {n: _given(v) if isinstance(v, Mapping) else v for n, v in changes.items()}
    return {n: v for n, v in given.items() if v is not None and v != {}}


def _replaced(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with fields replaced, part by part."""
    both = dict(values)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(name), Mapping)
        both[name] = _replaced(both[name], value) if nested else value
    return both
