"""What a family of checkpoints is: a map of its config and a table of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.interop.rows import Row
from jaxlm.model.config import ModelConfig


class HubConfig:
    """A config.json that remembers what was read of it.

    Attributes:
        unread: keys that nobody has asked for, nor said to be of no consequence.
    """

    # Of training, of other software, or of what the model is not used for here.
    IRRELEVANT = frozenset(
        {
            *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype"),
            *("torch_dtype", "use_cache", "initializer_range", "pretraining_tp", "id2label"),
            *("label2id", "problem_type", "return_dict", "output_hidden_states", "is_llama_config"),
            *("output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
            *("attention_dropout", "rope_interleaved", "transformers.js_config"),
            *("bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's own count
        }
    )

    def __init__(self, values: Mapping[str, Any], name: str):
        self._values, self.name = values, name
        self.unread = set(values) - self.IRRELEVANT

    def get(self, key: str, default: Any = None) -> Any:
        """The value; `default` if it is absent or null."""
        self.unread.discard(key)
        value = self._values.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        """The value.

        Raises:
            ValueError: it is absent.
        """
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.name}: {key} is absent; allowed: a config.json that has it")
        return value


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of the hub's.

    Attributes:
        architectures: its names in config.json.
        model: config.json → the fields of ModelConfig.
        rows: the tensors of a model, those of one layer standing for all.
    """

    architectures: tuple[str, ...]
    model: Callable[[HubConfig], dict[str, Any]]
    rows: Callable[[ModelConfig], list[Row]]
