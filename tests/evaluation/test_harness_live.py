"""lm-eval's figures through our adapter and through its own of transformers (pytest -m torch).

On one model, and on tasks of each kind in a folder: a choice, a text in rolling windows, an answer
up to a stop string.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.data.train_bpe import BOS, EOS
from jaxlm.interop.write import write_hub_folder
from jaxlm.model.config import AttentionConfig, ModelConfig
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from tests.data.samples import make_bpe, training_text

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]  # others' are not ours

LENGTH = 64
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "loglikelihood_rolling": 'doc_to_text: ""\nmetric_list: [{metric: bits_per_byte}]',
    "generate_until": "generation_kwargs: {until: [e], max_gen_toks: 20}\n"
    "metric_list: [{metric: exact_match}]",
}


def write_tasks(folder):
    """Names of tasks, of texts short, empty and longer than the model's context."""
    text = training_text()
    contexts = [text[:40], "", text[100:700], text[50:60] + " ", text[900:930]]
    for kind, rest in KINDS.items():
        documents = []
        if kind == "generate_until":  # where transformers would begin from nothing but padding
            contexts = [context or text[70:80] for context in contexts]
        for i, context in enumerate(contexts):
            more = text[2000 + 50 * i :]
            choices = [" " + more[:10], more[:25], f"{EOS} a"]
            answer = {"multiple_choice": 1, "loglikelihood_rolling": more[: 200 + 300 * i]}
            documents.append(
                {"context": context, "choices": choices, "answer": answer.get(kind, "x")}
            )
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(d) + "\n" for d in documents))
        lines = TASK.format(name=f"jaxlm_{kind}", data=data, kind=kind).splitlines()
        replaced = {x.partition(":")[0] for x in rest.splitlines()}
        kept = [x for x in lines if x.partition(":")[0] not in replaced]
        (folder / f"{kind}.yaml").write_text("\n".join([*kept, rest]))
    return [f"jaxlm_{kind}" for kind in KINDS]


def write_model(folder, begins):
    """A hub folder whose texts begin with the start token, or do not; and its file of tokens."""
    path = Path(make_bpe(folder))
    about = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": begins}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = load_tokenizer(str(path))
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            num_layers=2,
            d_model=32,
            context_length=LENGTH,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        )
    )
    # Larger weights than at the start of training: choices are not all alike.
    params = jax.tree.map(lambda x: 3 * x, init_params(model, 0))
    write_hub_folder(folder / "hub", model, params, tokenizer, "LlamaForCausalLM")


def their_tokenizer(folder, begins):
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer.from_file(str(folder / "hub" / "tokenizer.json"))
    if begins:
        start = (BOS, inner.token_to_id(BOS))
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[start]
        )
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)


@pytest.mark.parametrize("begins", [True, False])
def test_figures_are_those_of_the_adapter_of_transformers(tmp_path, monkeypatch, begins):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import jaxlm
    from jaxlm.evaluation.harness import harness_model

    tasks = write_tasks(tmp_path)
    write_model(tmp_path, begins)
    theirs = HFLM(
        pretrained=str(tmp_path / "hub"),
        tokenizer=their_tokenizer(tmp_path, begins),
        dtype="float32",
        device="cpu",
        batch_size=2,
    )
    ours = harness_model(*jaxlm.load(tmp_path / "hub"), batch_size=2)
    assert ours.max_length == theirs.max_length == LENGTH
    assert ours.prefix_token_id == theirs.prefix_token_id
    manager = TaskManager(include_path=str(tmp_path))
    got, want = (
        lm_eval.simple_evaluate(one, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        for one in (ours, theirs)
    )
    for task in tasks:
        pairs = zip(got["samples"][task], want["samples"][task], strict=True)
        for mine, other in pairs:
            said = ([answer for (answer,) in one["resps"]] for one in (mine, other))
            for a, b in zip(*said, strict=True):
                # float32 sums in another order, of up to 400 terms of about 8
                assert a == b if isinstance(a, str) else a == pytest.approx(b, rel=1e-5), task
    answers = [s["resps"][0][0] for s in got["samples"]["jaxlm_generate_until"]]
    assert len(set(answers)) > 2 and not any("e" in a for a in answers)

    command = [sys.executable, "-m", "launch.harness", f"--checkpoint={tmp_path / 'hub'}"]
    command += [f"--tasks={','.join(tasks)}", f"--include_path={tmp_path}", f"--output={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads((tmp_path / "harness.json").read_text())
    results, config = written["results"], written["config"]
    assert config["checkpoint"] == str(tmp_path / "hub")
    assert {"position_encoding", "max_length"} <= config.keys()
    for task in tasks:
        for name, value in want["results"][task].items():
            if isinstance(value, float):
                assert results[task][name] == pytest.approx(value, rel=1e-5), (task, name)
        assert f"|{task}" in run.stdout
