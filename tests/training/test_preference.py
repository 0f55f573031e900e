"""DPO: its formula on packed pairs, and a model that learns which of two answers is better."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import add_adapters
from jaxlm.data.config import DataConfig, SourceConfig
from jaxlm.data.store import build_store
from jaxlm.interop.write import write_hub_folder
from jaxlm.model.parameters import init_params
from jaxlm.training.config import OptimizerConfig, TrainConfig
from jaxlm.training.finetune import FinetuneConfig
from jaxlm.training.metrics import read_metrics
from jaxlm.training.objectives.preference import Preference
from jaxlm.training.run import RunConfig
from jaxlm.training.train import train
from tests.data.test_chat import CHATML, TALK, make
from tests.training.cases import make_model

USER = [{"role": "user", "content": "Say a letter"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def write_pairs(path, pairs):
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in pairs]
    path.write_text("\n".join(lines))
    return str(path)


PAIRS = [
    (USER, say("a" * n), say("b" * m)) for n, m in ((3, 1), (1, 4), (2, 2), (5, 3), (1, 1))
] + [(TALK[:3], say("a"), say("b"))]


def stored(tmp_path, pairs, length=220):
    path = write_pairs(tmp_path / "pairs.preference.jsonl", pairs)
    return build_store(SourceConfig(path), make(CHATML), length, tmp_path / "cache")


def test_rows_hold_whole_pairs_and_only_the_last_answer_counts(tmp_path):
    store = stored(tmp_path, PAIRS)
    assert store.pairs and len(store) > 1
    tokenizer, found = make(CHATML), []
    for row in store:
        for segment in range(1, int(row["segment_ids"].max()) + 1, 2):
            both = []
            for one in (segment, segment + 1):
                here = row["segment_ids"] == one
                text = tokenizer._inner.decode(
                    row["targets"][here & (row["loss_weights"] > 0)], skip_special_tokens=False
                )
                both.append(text.removesuffix("<|im_end|>"))
                assert (row["positions"][here] == np.arange(here.sum())).all()
            found.append(tuple(both))
    assert sorted(found) == sorted((c[0]["content"], r[0]["content"]) for _, c, r in PAIRS)


def test_a_pair_longer_than_a_row_is_left_out(tmp_path, caplog):
    store = stored(tmp_path, [*PAIRS[:2], (USER, say("a" * 300), say("b"))])
    assert "1 of 3 pairs are longer than a row" in caplog.text
    assert sum(int(row["segment_ids"].max()) for row in store) == 4


@pytest.mark.parametrize(
    ("chosen", "rejected", "length", "message"),
    [
        (USER, say("b"), 220, "line 2: chosen ends with role='user'; allowed: 'assistant'"),
        (say("a"), say("b") + USER, 220, "line 2: rejected ends with role='user'; allowed"),
        (say("a"), say("a"), 220, "line 2: chosen and rejected are the same; allowed: two that"),
        (say("a"), [{"role": "x", "content": ""}, *say("b")], 220, "line 2: .* says: no role x"),
        (say("a"), say("b"), 10, "l: data.sequence_length=10; allowed: at least 66, the tokens"),
    ],
)
def test_pairs_that_teach_nothing(tmp_path, chosen, rejected, length, message):
    with pytest.raises(ValueError, match=f"pairs.preference.json.*{message}"):
        stored(tmp_path, [PAIRS[2], (USER, chosen, rejected)], length)


def test_the_papers_formula(tmp_path):
    """Equation 7 for each pair alone, in a row of its own, from all logits."""
    model = make_model(vocab_size=320, context_length=256)
    pairs = [PAIRS[0], PAIRS[-1]]
    store, tokenizer = stored(tmp_path, pairs), make(CHATML)
    batch = jax.device_put({k: np.stack([r[k] for r in store]) for k in store[0]})
    base = init_params(model, 0)
    params = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.1), base)
    # All answers in one program: what comes behind a text changes nothing in it.
    answers = [(prompt, answer) for prompt, *both in pairs for answer in both]
    rows = [jaxlm.chat_example(tokenizer, prompt + answer)[0] for prompt, answer in answers]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    learned = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        # The line break after the answer's end is not learned.
        learned[i, len(jaxlm.chat_prompt(tokenizer, answers[i][0])) : len(row) - 1] = True

    def log_probs(p):
        """Of each answer, in its row alone."""
        log_p = jax.nn.log_softmax(model.apply({"params": p}, jnp.asarray(ids))[0])
        of_each = jnp.take_along_axis(log_p[:, :-1], ids[:, 1:, None], 2)[..., 0]
        return jnp.where(learned[:, 1:], of_each, 0.0).sum(1)

    def formula(p):
        gains = log_probs(p) - log_probs(base)
        better, worse = gains[::2], gains[1::2]
        return -jax.nn.log_sigmoid(0.5 * (better - worse)).sum(), (better > worse).sum()

    objective = Preference(model, 0.5, 50)  # no divisor of a row's length
    assert objective.weight(batch) == len(pairs)
    (loss, (sums, _)), gradients = jax.jit(
        jax.value_and_grad(lambda p: objective(p, base, batch), has_aux=True)
    )(params)
    (want, right), wanted = jax.jit(jax.value_and_grad(formula, has_aux=True))(params)
    # float32 sums in another order
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert sums["loss"] == loss and int(sums["accuracy"]) == right
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-7)


def test_a_fresh_adapter_is_its_own_reference(tmp_path):
    model = make_model(vocab_size=320, context_length=256)
    batch = jax.device_put({k: v[None] for k, v in stored(tmp_path, PAIRS)[0].items()})
    whole = jax.jit(lambda: add_adapters(model, init_params(model), AdapterConfig(rank=2)))()
    objective = Preference(model, 0.5, 64)
    loss, (sums, _) = jax.jit(objective.__call__)(whole, whole, batch)
    np.testing.assert_allclose(loss / objective.weight(batch), np.log(2), rtol=1e-6)
    assert sums["margin"] == 0


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A hub folder of a small model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("model") / "hub"
    model = make_model(vocab_size=320, context_length=256)
    write_hub_folder(folder, model, init_params(model), make(CHATML))
    return folder


def run_of(folder, sources, **finetune):
    return RunConfig(
        model={},
        data=DataConfig(
            sources=sources, held_out=(), tokenizer="checkpoint", sequence_length=220, batch_size=2
        ),
        train=TrainConfig(
            steps=12,
            log_every=1,
            optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=0, weight_decay=0.0),
        ),
        finetune=FinetuneConfig(str(folder), adapter=AdapterConfig(rank=4), **finetune),
    )


@pytest.mark.slow
def test_it_learns_which_answer_is_better(chat_model, tmp_path):
    sources = write_pairs(tmp_path / "pairs.preference.jsonl", PAIRS)
    train(run_of(chat_model, sources, preference_beta=0.5), tmp_path / "run")
    records = [r for r in read_metrics(tmp_path / "run") if "margin" in r]
    np.testing.assert_allclose(records[0]["loss"], np.log(2), rtol=1e-6)
    assert records[-1]["loss"] < 0.3 and records[-1]["accuracy"] == 1
    assert "bits_per_byte" not in records[0]


@pytest.mark.slow
def test_it_learns_what_the_assistant_says(chat_model, tmp_path):
    path = tmp_path / "talks.chat.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    train(run_of(chat_model, str(path)), tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert losses[-1] < losses[0] - 1


def test_pairs_and_objectives_belong_together(chat_model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.preference.jsonl", PAIRS)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    with pytest.raises(ValueError, match=r"allowed: no pairs of answers without finetune.pref"):
        train(run_of(chat_model, pairs), tmp_path / "a")
    with pytest.raises(ValueError, match=r"allowed: pairs of answers with finetune.preference"):
        train(run_of(chat_model, str(text), preference_beta=0.1), tmp_path / "b")
    with pytest.raises(ValueError, match=r"preference_beta=0.1; allowed: None without an adapter"):
        FinetuneConfig("x", preference_beta=0.1)
