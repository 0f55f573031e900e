"""What a family of checkpoints is: a map of its config and a table of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
            *("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout"),
            *("classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
            *("router_jitter_noise", "output_router_logits", "n_ctx", "task_specific_params"),
            *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
            *("summary_proj_to_labels", "reorder_and_upcast_attn", "is_decoder"),
            *("transformers.js_config",),
            *("bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's own count
        }
    )

    def __init__(self, values: Mapping[str, Any], name: str):
        self._values, self.name = values, name
        self.unread = {k for k, v in values.items() if v is not None} - self.IRRELEVANT

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

    def only(self, key: str, *allowed: Any) -> None:
        """Checks a choice of which the model here has one; the first is what absence means.

        Raises:
            ValueError: it is another.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            shown = ", ".join(str(a) for a in allowed)
            raise ValueError(f"{self.name}: {key}={value!r}; allowed: {shown}")


# Names of activations: of the MLPs that they gate, of plain ones.
GATED = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
KINDS = {"full_attention": "global", "sliding_attention": "sliding"}


def activation(config: HubConfig, gated: bool, key: str = "hidden_act") -> str:
    """FeedForwardConfig's kind.

    Raises:
        ValueError: an activation that is not known.
    """
    known, name = GATED if gated else PLAIN, config.require(key)
    if name not in known:
        raise ValueError(f"{config.name}: {key}={name!r}; allowed: {', '.join(known)}")
    return known[name]


def layer_pattern(config: HubConfig, default: Sequence[str] = ("global",)) -> dict[str, Any]:
    """AttentionConfig's layer_pattern and sliding_window, from layer_types if it is there.

    Raises:
        ValueError: a kind of layer that is not known.
    """
    types, window = config.get("layer_types"), config.get("sliding_window")
    layers = config.require("num_hidden_layers")
    kinds = [default[i % len(default)] for i in range(layers)]
    if types is not None:
        unknown = sorted(set(types) - KINDS.keys())
        if unknown or len(types) != layers:
            raise ValueError(
                f"{config.name}: layer_types={types!r}; allowed: {layers} of {', '.join(KINDS)}"
            )
        kinds = [KINDS[t] for t in types]
    if window is None:
        kinds = ["global"]
    period = next(n for n in range(1, layers + 1) if kinds == (kinds[:n] * layers)[: len(kinds)])
    slides = "sliding" in kinds
    return {
        "layer_pattern": tuple(kinds[:period]),
        "sliding_window": window if slides else None,
    }


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
