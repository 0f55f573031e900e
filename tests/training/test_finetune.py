"""Training that goes on from a checkpoint: all of it, or an adapter of it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import is_learned, merge_adapters
from jaxlm.checkpoints import (
    ConfigMismatchError,
    Saver,
    available_steps,
    load_numpy,
    restore,
)
from jaxlm.checkpoints.config_file import CONFIG
from jaxlm.checkpoints.layout import step_folder
from jaxlm.load import loaded_shapes, open_checkpoint
from jaxlm.model.parameters import size_by_part
from jaxlm.model.partition import split
from jaxlm.training.finetune import FinetuneConfig
from jaxlm.training.metrics import read_metrics
from jaxlm.training.start import open_base
from jaxlm.training.workdir import CHECKPOINTS
from tests.training.texts import tiny_run, train_tiny, write_texts

LORA = AdapterConfig(rank=4, targets="attention/.*|feed_forward/.*")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    """A run of 10 steps."""
    workdir = tmp_path_factory.mktemp("base")
    train_tiny(tiny_run(texts, train__steps=10), workdir, texts / "cache")
    return workdir


def finetuned(texts, base, steps=20, model=None, data=None, **options):
    run = tiny_run(texts, train__steps=20)
    return dataclasses.replace(
        run,
        model=model or {},
        data=dataclasses.replace(run.data, tokenizer="checkpoint", **(data or {})),
        train=dataclasses.replace(run.train, steps=steps),
        finetune=FinetuneConfig(str(base), **options),
    )


@pytest.fixture(scope="module")
def adapted(texts, base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted")
    return workdir, train_tiny(finetuned(texts, base, adapter=LORA), workdir, texts / "cache")


def test_an_adapter_is_learned_and_the_rest_stays(base, adapted):
    workdir, result = adapted
    _, before, _ = jaxlm.load(base)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(before),
        jax.tree.leaves(result_base(result)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))
    records = [r["held_out_loss"] for r in read_metrics(workdir) if "held_out_loss" in r]
    first = [r["held_out_loss"] for r in read_metrics(base) if "held_out_loss" in r][-1]
    assert records[-1] < first - 0.05
    # The checkpoint holds the adapter, not what it adapts.
    saved = load_numpy(workdir / CHECKPOINTS)["params"]
    names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(saved)}
    assert names == {"a", "b"}


def result_base(result):
    """The frozen part without the adapters' scales."""

    def plain(tree):
        return {k: plain(v) if isinstance(v, dict) else v for k, v in tree.items() if k != "lora"}

    return plain(result.frozen)


def test_it_loads_and_merges(adapted, texts):
    workdir, result = adapted
    model, params, tokenizer = jaxlm.load(workdir)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(x, y)
    tokens = np.asarray([tokenizer.encode("it was the best of times")], np.int32)
    run = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens)[0])
    both = [run(p, tokens) for p in (params, jax.jit(merge_adapters)(params))]
    # float32 sums in another order
    np.testing.assert_allclose(*both, atol=1e-4)
    kind = {"temperature": 0.0, "max_new_tokens": 4}
    assert jaxlm.generate(model, params, tokenizer, ["it was"], **kind)


class CutError(Exception):
    pass


def test_a_run_cut_in_two_is_the_same(texts, base, adapted, tmp_path, monkeypatch):
    """Cut after its first checkpoint, at step 10 of 20, and started again."""
    run = finetuned(texts, base, adapter=LORA)
    save = Saver.save

    def save_and_fail(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        self.wait()
        raise CutError

    with monkeypatch.context() as patch, pytest.raises(CutError):
        patch.setattr(Saver, "save", save_and_fail)
        train_tiny(run, tmp_path, texts / "cache")
    assert available_steps(tmp_path / CHECKPOINTS) == [10]
    again = train_tiny(run, tmp_path, texts / "cache")
    for x, y in zip(jax.tree.leaves(again.state), jax.tree.leaves(adapted[1].state), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_all_parameters_and_another_encoding(texts, base, tmp_path):
    model = {"position_encoding": "lm_infinite(window=8)", "dropout": 0.0}
    run = finetuned(texts, base, steps=2, model=model)
    result = train_tiny(run, tmp_path, texts / "cache")
    loaded, params, _ = jaxlm.load(tmp_path)
    assert "lm_infinite" in str(loaded.config.position_encoding)
    assert result.frozen == {}
    _, before, _ = jaxlm.load(base)
    moved = [
        np.abs(x - y).max()
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)
    ]
    assert all(m > 0 for m in moved)


@pytest.mark.slow
def test_an_adapter_of_a_quantized_model(texts, base, tmp_path):
    run = finetuned(texts, base, steps=2, adapter=LORA, quantize="int4")
    result = train_tiny(run, tmp_path, texts / "cache")
    kept = [(x.shape, x.dtype) for x in jax.tree.leaves(result.params)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(loaded_shapes(tmp_path))] == kept
    sizes = size_by_part(result.params)
    count, num_bytes = sizes["attention"]
    # A matrix in 4 bits with float32 scales, which are not many.
    assert count / 2 < num_bytes < count
    assert sizes["adapter"][0] == jaxlm.count_params(result.state.params) + 14
    assert "int4" in {x.dtype.name for x in jax.tree.leaves(result.frozen)}
    _, params, _ = jaxlm.load(tmp_path)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_another_base_is_refused(texts, base, adapted, tmp_path):
    """What lies at the path is no longer what the adapter was learned on."""
    workdir = shutil.copytree(adapted[0], tmp_path / "run")
    path = workdir / CONFIG
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base": "0" * 64}))
    with pytest.raises(ConfigMismatchError, match=f"base: .{settings['base']}. here, .0000"):
        train_tiny(finetuned(texts, base, adapter=LORA), workdir, texts / "cache")


@pytest.mark.slow
def test_a_base_that_moves_on(texts, base, tmp_path):
    """A run keeps to the step it began with, and takes nothing else for it."""
    base = shutil.copytree(base, tmp_path / "base")
    workdir, checkpoints = tmp_path / "run", base / CHECKPOINTS
    run = finetuned(texts, base, steps=2, adapter=LORA)
    before = train_tiny(run, workdir, texts / "cache").params
    longer = tiny_run(texts, train__steps=20)
    train_tiny(longer, base, texts / "cache", allow_config_change=True)
    assert available_steps(checkpoints) == [10, 20]
    train_tiny(run, workdir, texts / "cache")  # its config names no step, its workdir does
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(jaxlm.load(workdir)[1]), strict=True):
        np.testing.assert_array_equal(x, y)

    ten = restore(checkpoints, step=10)
    files = {"tokenizer": shutil.copytree(ten.folder / "tokenizer", tmp_path / "tokenizer")}
    with Saver(checkpoints) as saver:
        saver.save(10, jax.tree.map(lambda x: x * 2, ten.state), ten.metadata, files)
    known = json.loads((workdir / CONFIG).read_text())["base"]
    for kind in ({}, {"param_dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=f"base'? of step 10 has the digest .* {known}"):
            jaxlm.load(workdir, **kind)
    shutil.rmtree(step_folder(checkpoints, 10))
    with pytest.raises(FileNotFoundError, match="no good checkpoint of step 10"):
        jaxlm.load(workdir)


def test_an_adapter_in_another_dtype(adapted):
    _, params, _ = jaxlm.load(adapted[0], param_dtype="bfloat16")
    learned, frozen = split(params, is_learned)
    assert {x.dtype.name for x in jax.tree.leaves(learned)} == {"float32"}
    assert "bfloat16" in {x.dtype.name for x in jax.tree.leaves(frozen)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_model": 64}}, r"with these fields .* is \[.*64.*\]; allowed: \[.*32"),
        ({"adapter": AdapterConfig(rank=2, targets="nothing")}, "targets='nothing'"),
        ({"data": {"sources": ("nowhere.txt",)}}, "no such file"),
    ],
)
def test_what_does_not_fit_is_refused(texts, base, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_tiny(finetuned(texts, base, **changes), tmp_path, texts / "cache")


def test_the_tokenizer_is_the_checkpoints(texts, base, tmp_path):
    run = finetuned(texts, base)
    # Its step's: a run that goes on in the workdir may have written another, and saved nothing yet.
    moved = shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(moved / "tokenizer")
    (moved / CONFIG).write_text("another")
    config, model, tokenizer = open_base(FinetuneConfig(str(moved)), tmp_path / "run")
    assert (config.step, model.d_model, tokenizer.name) == (10, 32, "bytes")
    # A run that began with a step goes on when that is kept no more.
    gone = shutil.copytree(base, tmp_path / "gone")
    shutil.rmtree(step_folder(gone / CHECKPOINTS, 10))
    model, tokenizer, step = open_checkpoint(gone, 10)
    assert (step, model.d_model, tokenizer.name) == (10, 32, "bytes")
    with pytest.raises(ValueError, match="tokenizer='bytes'; allowed: that of the checkpoint"):
        dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer="bytes"))
    with pytest.raises(ValueError, match="allowed: any tokenizer, without finetune"):
        dataclasses.replace(run, finetune=None)
    with pytest.raises(ValueError, match="quantize='int8'; allowed: None without an adapter"):
        FinetuneConfig(str(base), quantize="int8")
