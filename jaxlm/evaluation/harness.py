"""A model of ours as one that EleutherAI's lm-evaluation-harness (lm-eval) can ask.

    lm = harness_model(*jaxlm.load("runs/quickstart"))
    lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

Texts become tokens as in lm-eval's own adapter of transformers, so that both give the same figures:
what looks like a special token is one, and a text begins with the tokenizer's start token.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxlm.config import at_least, check
from jaxlm.data.chat import render_chat
from jaxlm.data.optional import optional
from jaxlm.data.tokenizers import HuggingFace, Tokenizer
from jaxlm.decoding.generate import generate
from jaxlm.evaluation.scoring import score_continuations
from jaxlm.model.transformer import Transformer

# Tokens of an answer where a task does not say: as in lm-eval's adapter of transformers.
MAX_NEW_TOKENS = 256


def encode(tokenizer: Tokenizer, text: str, start: bool = True) -> list[int]:
    """Ids of a text; with `start` after the start token, if texts have one and it is not there."""
    if isinstance(tokenizer, HuggingFace):
        ids = [i for i, *_ in tokenizer.encode_special(text)]
    else:
        ids = tokenizer.encode(text)
    first = tokenizer.bos_id if start else None
    return ids if first is None or ids[:1] == [first] else [first, *ids]


def prefix_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that has no context: the start token, even one that texts do not
    begin with otherwise, or else the end token.
    """
    named = tokenizer.special_text("bos_token") if isinstance(tokenizer, HuggingFace) else ""
    ids = encode(tokenizer, named, start=False)
    if len(ids) == 1:
        return ids[0]
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs as arguments of `jaxlm.generate`.

    Raises:
        ValueError: one that `jaxlm.generate` has no counterpart of.
    """
    left = dict(given)
    stop = left.pop("until", None) or []
    sizes = [left.pop(n, None) for n in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    size = next((n for n in sizes if n is not None), MAX_NEW_TOKENS)
    settings: dict[str, Any] = {"stop": [stop] if isinstance(stop, str) else [s for s in stop if s]}
    draws = left.pop("do_sample", left.get("temperature", 0.0) > 0)
    temperature = left.pop("temperature", 1.0)
    settings |= {"max_new_tokens": int(size), "temperature": temperature if draws else 0.0}
    settings |= {n: left.pop(n) for n in ("top_k", "top_p", "seed") if n in left}
    if left:
        known = "until, max_gen_toks, temperature, do_sample, top_k, top_p, seed"
        raise ValueError(f"generation_kwargs: {', '.join(left)}; allowed: {known}")
    return settings


def answer(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, Mapping[str, Any]]],
    batch_size: int,
    max_length: int,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[str]:
    """What the model says after each (context, generation_kwargs).

    Raises:
        ValueError: settings that are not known, or no room for a context beside the answer.
    """
    groups = defaultdict(list)
    for i, (_, given) in enumerate(prompts):
        groups[repr(sorted(given.items()))].append(i)
    ids = [encode(tokenizer, context) or [prefix_token(tokenizer)] for context, _ in prompts]
    batches = []
    for members in groups.values():
        order = sorted(members, key=lambda i: -len(ids[i]))
        batches += [order[s : s + batch_size] for s in range(0, len(order), batch_size)]
    texts = [""] * len(prompts)
    for b in track(range(len(batches))):
        settings = generation_settings(prompts[batches[b][0]][1])
        room = max_length - settings["max_new_tokens"]
        if room < 1:
            size = settings["max_new_tokens"]
            raise ValueError(f"max_gen_toks={size}; allowed: less than max_length={max_length}")
        # The last batch is filled up: a program serves one number of rows.
        rows = [ids[i][-room:] for i in batches[b]]
        rows += [rows[-1]] * (batch_size - len(rows))
        said = generate(model, params, tokenizer, rows, **settings)
        for i, text in zip(batches[b], said, strict=False):
            texts[i] = text
    return texts


class HarnessMethods:
    """What lm-eval's TemplateLM leaves to an adapter; TemplateLM splits texts and pairs tokens.

    Attributes:
        max_length: most tokens the model reads at once; the start of a longer text is left out.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        tokenizer: Tokenizer,
        batch_size: int,
        max_length: int,
    ):
        super().__init__()
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return self.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text."""
        return encode(self.tokenizer, string, add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return score_continuations(
            self.model,
            self.params,
            [(context, continuation) for _, context, continuation in requests],
            self.batch_size,
            self.max_length,
            _bar("log-likelihoods: batches", disable_tqdm),
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap."""
        utils = optional("lm_eval.utils", "jaxlm.evaluation.harness", "harness")
        windows: list[tuple[int, list[int], list[int]]] = []
        for i, request in enumerate(requests):
            ids, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            for pair in utils.get_rolling_token_windows(ids, prefix, self.max_length, 1):
                windows.append((i, *utils.make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for (i, _, _), (score, _) in zip(windows, scores, strict=True):
            totals[i] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to a stop string."""
        return answer(
            self.model,
            self.params,
            self.tokenizer,
            [request.args for request in requests],
            self.batch_size,
            self.max_length,
            _bar("answers: batches", disable_tqdm),
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without a prompt to answer, its last turn is left open."""
        text = render_chat(self.tokenizer, chat_history, generate=add_generation_prompt)
        if add_generation_prompt:
            return text
        said = chat_history[-1]["content"]
        begins = text.rindex(said.strip())
        # As in transformers: a space that it ends with stays, where the template leaves it.
        left = said.lstrip()
        return text[:begins] + (left if text.startswith(left, begins) else said.strip())


def _bar(what: str, disable: bool) -> Callable[[Sequence[int]], Iterable[int]]:
    tqdm = optional("tqdm", "jaxlm.evaluation.harness", "harness")
    return functools.partial(tqdm.tqdm, desc=what, disable=disable)


def harness_model(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Any:
    """An `lm_eval.api.model.LM` that answers by a model of ours.

    Args:
        model, params, tokenizer: as from `jaxlm.load`.
        batch_size: requests at a time.
        max_length: most tokens the model reads at once. None: its context length.

    Raises:
        MissingPackageError: lm-eval is not installed.
        ValueError: a model whose tokens see later ones, or a setting out of range.
    """
    base: Any = optional("lm_eval.api.model", "jaxlm.evaluation.harness", "harness").TemplateLM
    limit, most = model.config.encoding.max_length, max_length or model.config.context_length
    check(
        "harness_model",
        batch_size=at_least(batch_size, 1),
        max_length=(most, 2 <= most <= (limit or most), f"2 to {limit or 'any number'}"),
        layer_pattern=(
            model.config.attention.layer_pattern,
            not model.config.sees_ahead,
            "no bidirectional layer",
        ),
    )

    class HarnessModel(HarnessMethods, base):
        """Known to lm-eval as a model."""

    return HarnessModel(model, params, tokenizer, batch_size, most)
