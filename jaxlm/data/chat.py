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
    _check(messages)
    return _render(tokenizer, messages, generate, variables)


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    generate: bool,
    variables: Mapping[str, Any],
) -> str:
    """`render_chat` of messages that may be none."""
    own, template = _with_template(tokenizer)
    try:
        return render(
            template,
            {
                "messages": messages,
                "add_generation_prompt": generate,
                # None, not undefined: a template asks for either.
                "tools": None,
                "documents": None,
                "bos_token": "",
                "eos_token": "",
                **own.special_texts(),
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
    return [i for i, *_ in _with_template(tokenizer)[0].encode_special(text)]


def chat_example(
    tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any
) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, and which of them a model should learn to say.

    Those are the assistant's turns, with the token that ends each: what the text gains when the
    turn is added to the conversation so far and its opening. A token that the opening ends in, such
    as " Hi" behind "ASSISTANT: ", is among them, as in transformers.

    Raises:
        ValueError: as `render_chat`; the template changes earlier turns when a later one comes, or
            can't say what comes before an assistant who speaks first.
    """
    text = render_chat(tokenizer, messages, generate=False, **variables)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _before(tokenizer, messages[:i], variables)
        after = render_chat(tokenizer, messages[: i + 1], generate=False, **variables)
        if i == 0 and not after.startswith(before):
            raise ValueError(
                _SPEAKS_FIRST.format(name=tokenizer.name, reason="it opens otherwise with none")
            )
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{tokenizer.name}: the chat template writes turn {i} another way once others "
                "follow; allowed: one that only appends"
            )
        spans.append((len(before), len(after.rstrip())))
    tokens = _with_template(tokenizer)[0].encode_special(text)
    learned = [any(start < b and a < end for a, b in spans) for _, start, end in tokens]
    return [i for i, *_ in tokens], learned


_SPEAKS_FIRST = (
    "{name}: messages[0] is the assistant's, and the chat template does not say what comes before "
    "it ({reason}); allowed: a system's or user's turn first"
)


def _before(tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """What the assistant's answer to the messages is put after; there may be none."""
    try:
        return _render(tokenizer, messages, True, variables)
    except ValueError as error:
        if messages:
            raise
        raise ValueError(_SPEAKS_FIRST.format(name=tokenizer.name, reason=error)) from error


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
