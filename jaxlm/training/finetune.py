"""Training that begins with a checkpoint: which one, and how much of it is learned."""

from __future__ import annotations

import dataclasses
import math

from jaxlm.adapters.config import AdapterConfig
from jaxlm.config import check, check_types, one_of


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What a run goes on from.

    The model and the tokenizer are the checkpoint's; the fields of the run's `model` replace those
    of the checkpoint, as far as its parameters stay what they are (another position encoding,
    dropout, another dtype).

    Attributes:
        checkpoint: whatever `jaxlm.load` takes; None: a fresh model.
        step: of a workdir; None: its newest good checkpoint.
        adapter: learn a low-rank adapter and keep the rest as it is; None: learn all parameters.
        preference_beta: learn from pairs of answers (sources FILE.preference.jsonl) by DPO, with
            this β, against the model below the adapter; None: next tokens.
        quantize: keep the matrices below an adapter in "int8" or "int4"; None: as they are stored.
    """

    checkpoint: str | None = None
    step: int | None = None
    adapter: AdapterConfig | None = None
    quantize: str | None = None
    preference_beta: float | None = None

    PARTS = {"adapter": AdapterConfig}

    def __post_init__(self):
        check_types(type(self), vars(self), "finetune")
        if self.adapter is not None and self.adapter.rank is None:
            object.__setattr__(self, "adapter", None)
        wanted = self.quantize
        check(
            "finetune",
            step=(self.step, self.step is None or self.step >= 0, "None or an integer >= 0"),
            quantize=one_of(wanted, None, "int8", "int4"),
        )
        beta = self.preference_beta
        check(
            "finetune",
            preference_beta=(beta, beta is None or 0 < beta < math.inf, "None or a number > 0"),
        )
        for name in ("quantize", "preference_beta"):
            if getattr(self, name) is not None and self.adapter is None:
                raise ValueError(
                    f"finetune: {name}={getattr(self, name)!r}; allowed: None without an adapter"
                )
