"""Conversations by a tokenizer's template: the text, the ids, and what is learned of them."""

import json

import pytest
import tokenizers

import jaxlm
from jaxlm.data.chat import render_chat
from jaxlm.data.config import SourceConfig
from jaxlm.data.store import build_store
from jaxlm.data.tokenizers import HuggingFace

CHATML = """\
{%- for message in messages %}
  {%- if message['role'] not in ('system', 'user', 'assistant') %}
    {{- raise_exception('no role ' + message['role']) }}
  {%- endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def say(role, content):
    return {"role": role, "content": content}


TALK = [
    say("user", "Hello"),
    say("assistant", "Hi there"),
    say("user", "Bye"),
    say("assistant", "So long"),
]


def make(template, merges=(), **config):
    """Bytes, pairs of them, and three special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    known = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    inner.model = tokenizers.models.BPE({c: i for i, c in enumerate(known)}, list(merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    config = {"eos_token": "<|endoftext|>", "chat_template": template, **config}
    return HuggingFace(inner.to_str().encode(), config, "chat")


def test_text_and_prompt():
    tokenizer = make(CHATML)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(tokenizer, TALK[:1]) == text
    ids = jaxlm.chat_prompt(tokenizer, TALK[:1])
    # Each special token is one id, all else a byte.
    assert len(ids) == len("user\nHello\nassistant\n") + 3
    assert tokenizer.decode(ids) == "user\nHello\nassistant\n"
    assert tokenizer.encode("<|im_end|>") != [ids[0]], "elsewhere special tokens are text"


def test_what_is_learned_is_the_assistants():
    tokenizer = make(CHATML)
    ids, learned = jaxlm.chat_example(tokenizer, TALK)
    spans, text = [], ""
    for i, flag in zip(ids, learned, strict=True):
        piece = tokenizer._inner.decode([i], skip_special_tokens=False)
        text += piece
        if flag and (not spans or spans[-1][1] != len(text) - len(piece)):
            spans.append([len(text) - len(piece), len(text)])
        elif flag:
            spans[-1][1] = len(text)
    assert text == render_chat(tokenizer, TALK, generate=False)
    assert [text[a:b] for a, b in spans] == ["Hi there<|im_end|>", "So long<|im_end|>"]


def test_a_token_that_the_opening_ends_in_is_learned():
    """The space of "A: " and the first letter are one token."""
    template = (
        "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' else 'U: ' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    tokenizer = make(template, [("Ġ", "H")])
    ids, learned = jaxlm.chat_example(tokenizer, TALK[:3])
    said = [i for i, flag in zip(ids, learned, strict=True) if flag]
    assert tokenizer._inner.decode(said, skip_special_tokens=False) == " Hi there<|im_end|>"


@pytest.mark.parametrize(
    ("template", "spoken"),
    [(CHATML, "Hi<|im_end|>"), ("{% for m in messages %}{{ m.content }}{% endfor %}", "Hi")],
)
def test_an_assistant_may_speak_first(template, spoken):
    ids, learned = jaxlm.chat_example(tokenizer := make(template), [say("assistant", "Hi")])
    said = [i for i, flag in zip(ids, learned, strict=True) if flag]
    assert tokenizer._inner.decode(said, skip_special_tokens=False) == spoken


def test_several_templates_and_a_template_file(tmp_path):
    tokenizer = make([{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}])
    assert render_chat(tokenizer, TALK) == "y"
    make(CHATML).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ bos_token }}")
    assert render_chat(jaxlm.load_tokenizer(str(tmp_path)), TALK) == "Hello"


def test_stop_tokens_are_those_of_generation_config(tmp_path):
    tokenizer = make(CHATML)
    end = jaxlm.chat_prompt(tokenizer, TALK[:1])[0] + 1
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    tokenizer = jaxlm.load_tokenizer(str(tmp_path))
    assert tokenizer.stop_ids == (tokenizer.eos_id, end)
    tokenizer.save(tmp_path / "again")
    assert jaxlm.load_tokenizer(str(tmp_path / "again")).stop_ids == tokenizer.stop_ids


def test_what_transformers_adds_to_jinja():
    template = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}"
    )
    assert render_chat(make(template), TALK) == 'HelloHi there{"a": "<é>"}4'


FORGETS = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
LOOKS = "{{ messages[0].role }}" + CHATML
COUNTS = "{{ messages | length }}" + CHATML
ESCAPES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "tokenizer=chat has no chat template; allowed: a chat model's tokenizer"),
        (CHATML, [], r"messages=\[\]; allowed: one or more"),
        (CHATML, [{"content": "x"}], r"messages\[0\]=.*allowed: a mapping with role and content"),
        (CHATML, [{"role": "judge", "content": "x"}], "the chat template says: no role judge"),
        ("{% for %}", TALK, "the chat template fails: "),
        ("{{ 1 / 0 }}", TALK, "the chat template fails: division by zero"),
        (ESCAPES, TALK, "the chat template fails: .*unsafe"),
        (LOOKS, TALK[1:], r"messages\[0\] is the assistant's.*no element 0\); allowed: a system's"),
        (COUNTS, TALK[1:2], r"messages\[0\] is the assistant's.*opens otherwise.*; allowed: a sy"),
        (FORGETS, TALK, "writes turn 1 another way once others follow; allowed: one that only"),
    ],
)
def test_bad_templates_and_messages(template, messages, message):
    with pytest.raises(ValueError, match=message):
        jaxlm.chat_example(make(template), messages)


def test_bytes_have_no_template():
    with pytest.raises(ValueError, match="tokenizer=bytes has no chat template"):
        jaxlm.chat_prompt(jaxlm.load_tokenizer("bytes"), TALK)


def test_packed_conversations_teach_the_answers_alone(tmp_path):
    """Every token is read once, and every token that `chat_example` marks is a target once."""
    tokenizer = make(CHATML, bos_token="<|endoftext|>")
    talks = [TALK[:n] for n in (2, 4, 1, 2)] + [[{"role": "user", "content": "long " * 9}, TALK[1]]]
    path = tmp_path / "talks.chat.jsonl"
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    store = build_store(SourceConfig(str(path)), tokenizer, 64, tmp_path / "cache")
    found, wanted = [], []
    for row in store:
        assert (row["loss_weights"][row["segment_ids"] == 0] == 0).all()
        found += row["targets"][row["loss_weights"] == 1].tolist()
    for talk in talks:
        ids, learned = jaxlm.chat_example(tokenizer, talk)
        wanted += [i for i, flag in zip(ids, learned, strict=True) if flag]
    assert sorted(found) == sorted(wanted) and store.num_targets == len(wanted)
    assert store.num_bytes == sum(
        len(m["content"]) for t in talks for m in t if m["role"] == "assistant"
    )
    # The template's own first token stays, whatever the tokenizer starts texts with.
    assert store[0]["tokens"][0] == jaxlm.chat_example(tokenizer, TALK)[0][0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "talks.chat.jsonl' has nothing to learn; allowed: at least one turn of the assistant",
        ),
        (
            '\n{"messages": [{"role": "user", "content": "x"}]}\n\n'
            '{"messages": [{"role": "judge", "content": "x"}]}',
            "talks.chat.jsonl, line 4: chat: the chat template says: no role judge",
        ),
        ('{"text": "x"}', r"line 1: messages=None; allowed: a list of one or more"),
        ('{"messages": []}', r"line 1: messages=\[\]; allowed"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "tools": {}}',
            r"line 1: tools=\{\}; allowed: a list",
        ),
        ('{"messages": ["x"]}', "line 1: a message is 'x'; allowed: an object"),
        ('{"messages": [{"role": "user"}]}', "line 1: a message's content is NoneType; allowed"),
    ],
)
def test_lines_that_are_no_conversation(tmp_path, line, message):
    path = tmp_path / "talks.chat.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        build_store(SourceConfig(str(path)), make(CHATML), 8, tmp_path / "cache")


def test_tools_beside_a_conversation(tmp_path):
    """What the assistant may call is in the text that it learns from."""
    tokenizer = make("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    pair = {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:]}
    for name, line in {"chat": {"messages": TALK[:2]}, "preference": pair}.items():
        path = tmp_path / f"talks.{name}.jsonl"
        path.write_text(json.dumps(line | {"tools": [{"name": "sum"}]}))
        store = build_store(SourceConfig(str(path)), tokenizer, 128, tmp_path / "cache")
        ids, _ = jaxlm.chat_example(tokenizer, TALK[:2], tools=[{"name": "sum"}])
        assert store.tokens[: len(ids)].tolist() == ids


def test_chats_and_texts_are_two_sources(tmp_path):
    (tmp_path / "a.chat.jsonl").write_text(json.dumps({"messages": TALK}))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="holds chat, text; allowed: one kind a source"):
        build_store(SourceConfig(f"{tmp_path}/*"), make(CHATML), 8, tmp_path / "cache")


def test_what_transformers_passes_too():
    """`is none` is not true of what is undefined."""
    template = (
        "{{ tools is none }} {{ documents is none }} {{ pad_token }} {{ unk_token is defined }}"
    )
    tokenizer = make(template, pad_token={"content": "<|im_end|>"})
    assert render_chat(tokenizer, TALK[:1]) == "True True <|im_end|> False"
    assert render_chat(tokenizer, TALK[:1], tools=[1]).startswith("False True")
