"""A config.json that remembers what was read of it; and how such files are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import fits

MAX_JSON_BYTES = 2**28
# Sizes, lengths and ids are int32 in what is computed with them.
MAX_INTEGER = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        ValueError: it is none, names a key twice, or is larger than any config or index.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        size = path.stat().st_size
        raise ValueError(f"{path} has {size} bytes; allowed: at most {MAX_JSON_BYTES}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; allowed: a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


class HubConfig:
    """A config.json that remembers what was read of it.

    Attributes:
        tensors: names of those beside it; empty where they are not known.
        unread: keys that nobody has asked for, nor said to be of no consequence.

    Args:
        absent: what keys mean that are not there; one that is there as null is none of them.
    """

    # Of training, of other software, or of what the model is not used for here.
    IRRELEVANT = frozenset(
        {
            *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype"),
            *("torch_dtype", "use_cache", "initializer_range", "pretraining_tp", "id2label"),
            *("label2id", "problem_type", "return_dict", "output_hidden_states", "is_llama_config"),
            *("output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
            *("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout"),
            *("attention_probs_dropout_prob", "hidden_dropout_prob", "gradient_checkpointing"),
            *("classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
            *("router_jitter_noise", "output_router_logits", "n_ctx", "task_specific_params"),
            *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
            *("summary_proj_to_labels", "reorder_and_upcast_attn", "is_decoder"),
            *("transformers.js_config", "cache_implementation", "output_past"),
            # Said again elsewhere, or how others compute it.
            *("initial_context_length", "slow_but_exact", "attention_softmax_in_fp32"),
            *("masked_softmax_fusion", "bias_dropout_fusion", "offset_alibi", "skip_bias_add"),
            *("skip_bias_add_qkv", "learned_pos_emb", "init_device", "embedding_fraction"),
            *("emb_pdrop", "resid_pdrop", "verbose", "init_config"),
            *("dropout_rate", "initializer_factor"),
            *("is_gated_act", "dense_act_fn"),  # T5: feed_forward_proj says it
            *("bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's own count
        }
    )

    def __init__(
        self,
        values: Mapping[str, Any],
        name: str,
        tensors: Collection[str] = (),
        absent: Mapping[str, Any] | None = None,
    ):
        self._values: Mapping[str, Any] = {**(absent or {}), **values}
        self.name, self.tensors = name, frozenset(tensors)
        self.unread = {k for k, v in values.items() if v is not None} - self.IRRELEVANT

    def get(self, key: str, default: Any = None, kind: Any = Any) -> Any:
        """The value; `default` if it is absent or null.

        Raises:
            ValueError: it is not of this kind, a type as in an annotation, or no number that is
                computed with.
        """
        self.unread.discard(key)
        value = self._values.get(key)
        if value is None:
            return default
        if not fits(value, kind) or not _usable(value, kind):
            shown = kind.__name__ if isinstance(kind, type) else str(kind)
            shown = f"a finite number, if whole at most {MAX_INTEGER}" if kind is Any else shown
            raise ValueError(f"{self.name}: {key}={_short(value)}; allowed: {shown}")
        return value

    def require(self, key: str, kind: Any = Any) -> Any:
        """The value.

        Raises:
            ValueError: it is absent, or not of this kind.
        """
        value = self.get(key, None, kind)
        if value is None:
            raise ValueError(f"{self.name}: {key} is absent; allowed: a file that has it")
        return value


def _usable(value: Any, kind: Any) -> bool:
    """Whether a number is finite, and an integer where one may be meant an int32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    most = MAX_INTEGER if isinstance(value, int) and kind is not float else sys.float_info.max
    return abs(value) <= most


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
