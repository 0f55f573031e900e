"""Beam search over sampled segments, ranked by how well each text goes with its prompt.

RankGen's inference (Krishna et al., arXiv 2205.09726, section 3): of each of a few texts many
segments are drawn; all texts so far, each as a whole, are scored; the best go on. The scorer is any
function, such as `jaxlm.embedding.rankgen.RankGen.scorer`'s; the language model is not changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.caches.kind import CacheKind
from jaxlm.config import check, integer_at_least
from jaxlm.decoding.completion import Completion, Scorer
from jaxlm.decoding.engine import decode
from jaxlm.decoding.generate import completion_of, drawn_of
from jaxlm.decoding.request import Prompts, make_request
from jaxlm.decoding.state import DecodeState
from jaxlm.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Reranked:
    """Settings; one text, one sample: plain drawing. One text, a segment as long as all: the best
    of `num_samples`.

    Attributes:
        beam_size: texts that go on.
        num_samples: segments drawn of each.
        segment_length: tokens of a segment.
    """

    beam_size: int = 2
    num_samples: int = 10
    segment_length: int = 20

    def __post_init__(self):
        check("reranked", **{n: integer_at_least(value, 1) for n, value in vars(self).items()})


def complete_reranked(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    prompts: Prompts,
    scorer: Scorer,
    reranked: Reranked,
    max_new_tokens: int = 115,
    cache: str | CacheKind = "dense",
    **settings: Any,
) -> list[list[Completion]]:
    """The `beam_size` best texts of each prompt, best first, the scorer's numbers as their scores.

    Args:
        model, params, tokenizer, prompts, max_new_tokens, cache: as of
            `jaxlm.decoding.generate.complete`.
        scorer: (prompt, texts) → a number for each, the larger the better.
        reranked: how many are drawn.
        **settings: of the draws, see `jaxlm.decoding.sampling.Sampling.make`; the paper's are
            top_p=0.9 at temperature 1.

    Raises:
        ValueError: as `complete`; a scorer that gives another number of scores.
    """
    beams, samples = reranked.beam_size, reranked.num_samples
    copies = beams * samples
    r = make_request(model, tokenizer, prompts, max_new_tokens, settings, cache, (), copies)
    state, until = r.start(model, params), 0
    stops = jnp.asarray(r.stop_tokens)
    live = np.ones(len(r.before), bool)
    while True:
        until = min(until + reranked.segment_length, max_new_tokens)
        state = decode(model, params, state, jnp.asarray(until), r.sampling, stops)
        drawn = drawn_of(state)
        best: list[list[tuple[int, Completion]]] = []
        for i, prompt in enumerate(prompts):
            rows = [row for row in range(i * copies, (i + 1) * copies) if live[row]]
            texts = [completion_of(tokenizer, r, r.before[row], drawn[row], ()) for row in rows]
            ranked = _ranked(prompt, texts, scorer)[:beams]
            best.append([(rows[j], text) for j, text in ranked])
        done = np.asarray(state.done)
        if until == max_new_tokens or all(done[row] for texts in best for row, _ in texts):
            return [[text for _, text in texts] for texts in best]
        # Where there are fewer texts than places, as others have ended, the first ones go twice.
        places = [texts[place % len(texts)][0] for texts in best for place in range(beams)]
        goes_on = np.repeat(np.array(places, np.int32), samples)
        # Of a text that has ended one copy is enough.
        live = ~done[goes_on] | (np.arange(len(goes_on)) % samples == 0)
        state = _reorder(state, jnp.asarray(goes_on))


def _ranked(prompt: Any, texts: list[Completion], scorer: Scorer) -> list[tuple[int, Completion]]:
    """Texts with their scores, and which each was, best first."""
    scores = list(scorer(prompt, [text.text for text in texts]))
    if len(scores) != len(texts):
        raise ValueError(f"scorer gave {len(scores)} scores; allowed: {len(texts)}, one a text")
    order = sorted(range(len(texts)), key=lambda j: -scores[j])
    return [(j, dataclasses.replace(texts[j], score=float(scores[j]))) for j in order]


_reorder = jax.jit(DecodeState.reorder, donate_argnums=0)
