"""Conversations as token ids, by the template of their tokenizer, and what of them to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.data.chat_template import render
from jaxlm.data.tokenizers import HuggingFace, Tokenizer

Message = Mapping[str, Any]
ASSISTANT = "assistant"


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], generate: bool = True, **variables: Any
) -> str:
    """The conversation as text, by the tokenizer's own Jinja template, in Jinja's sandbox.

    Args:
        tokenizer: of a chat model.
        messages: {"role": "user", "content": "…"}, in turn.
        generate: end with what an answer of the assistant begins with.
        **variables: more that the template knows of, such as tools.

    Raises:
        ValueError: the tokenizer has no template, or the template refuses the messages.
    """
    own, template = _with_template(tokenizer)
    _check(messages)
    try:
        return render(
            template,
            {
                "messages": messages,
                "add_generation_prompt": generate,
                "bos_token": own.special_text("bos_token"),
                "eos_token": own.special_text("eos_token"),
                **variables,
            },
        )
    except ValueError as error:
        raise ValueError(f"{tokenizer.name}: the chat template {error}") from error


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[int]:
    """The ids after which the assistant's answer follows; `jaxlm.generate` takes them as a prompt.

    What looks like a special token is one, in the messages too: do not pass on text of strangers
    that holds any.

    Raises:
        ValueError: as `render_chat`.
    """
    text = render_chat(tokenizer, messages, **variables)
    return [i for i, _ in _with_template(tokenizer)[0].encode_special(text)]


def chat_example(
    tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any
) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, and which of them a model should learn to say.

    Those are the assistant's turns, with the token that ends each: what the text gains when the
    turn is added to the conversation so far and its opening.

    Raises:
        ValueError: as `render_chat`; the template changes earlier turns when a later one comes.
    """
    text = render_chat(tokenizer, messages, generate=False, **variables)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = render_chat(tokenizer, messages[:i], generate=True, **variables)
        after = render_chat(tokenizer, messages[: i + 1], generate=False, **variables)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{tokenizer.name}: the chat template writes turn {i} another way once others "
                "follow; allowed: one that only appends"
            )
        spans.append((len(before), len(after.rstrip())))
    tokens = _with_template(tokenizer)[0].encode_special(text)
    learned = [any(a <= start < b for a, b in spans) for _, start in tokens]
    return [i for i, _ in tokens], learned


def _with_template(tokenizer: Tokenizer) -> tuple[HuggingFace, str]:
    if not isinstance(tokenizer, HuggingFace) or tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer={tokenizer.name} has no chat template; allowed: a chat model's tokenizer"
        )
    return tokenizer, tokenizer.chat_template


def _check(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={message!r}; allowed: a mapping with role and content")
    if not messages:
        raise ValueError("messages=[]; allowed: one or more")
