import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoints import (
    NoCheckpointError,
    Saver,
    StateMismatchError,
    available_steps,
    load_numpy,
    restore,
    tree_digest,
)
from tests.checkpoints.states import assert_same_bytes, state_at


def save(directory, *steps, **arguments):
    with Saver(directory) as saver:
        for step in steps:
            saver.save(step, state_at(step), **arguments)


def all_files(folder):
    return {
        os.path.relpath(os.path.join(parent, name), folder): open_bytes(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
    }


def open_bytes(*parts):
    with open(os.path.join(*parts), "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    "abstract", [state_at, lambda step: jax.eval_shape(lambda: state_at(step))]
)
def test_round_trip_is_bit_exact(tmp_path, abstract):
    save(tmp_path, 7)
    restored = restore(tmp_path, abstract(0))
    assert restored.step == 7
    assert restored.refused == ()
    assert restored.digest == tree_digest(state_at(7))["whole"]
    assert_same_bytes(restored.state, state_at(7))


def test_equal_runs_write_equal_files(tmp_path):
    save(tmp_path / "a", 1, 2, metadata={"x": 1}, files={"tokenizer/t.json": b"{}"})
    save(tmp_path / "b", 1, 2, metadata={"x": 1}, files={"tokenizer/t.json": b"{}"})
    assert len(all_files(tmp_path / "a")) > 20
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")


def test_state_may_be_donated_and_overwritten_at_once(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, state = np.zeros(100_000, np.float32), jnp.zeros(100_000)
    with Saver(tmp_path) as saver:
        for i in range(4):
            saver.save(i, {"device": state, "host": array})
            state = step(state)
            array += 1
    for i in (1, 2, 3):
        loaded = load_numpy(tmp_path, step=i)
        assert set(loaded["device"]) == set(loaded["host"]) == {np.float32(i)}


def test_save_returns_before_the_step_is_written(tmp_path, monkeypatch):
    """Held up by a lock inside the write: save() must not wait for it."""
    import threading

    import jaxlm.checkpoints.commit as commit_module

    may_write = threading.Event()
    seal = commit_module.seal

    def held_up(*arguments):
        assert may_write.wait(30)
        return seal(*arguments)

    monkeypatch.setattr(commit_module, "seal", held_up)
    with Saver(tmp_path) as saver:
        saver.save(1, {"a": np.zeros(3)})
        assert available_steps(tmp_path) == []
        may_write.set()
        saver.wait()
        assert available_steps(tmp_path) == [1]


def test_metadata_and_files_come_back(tmp_path):
    tokenizer = tmp_path / "source"
    (tokenizer / "sub").mkdir(parents=True)
    (tokenizer / "sub" / "vocab.json").write_bytes(b"[1]")
    config = {"train": {"rate": 0.1, "betas": (1, 2)}, "name": "é"}
    files = {"tokenizer": tokenizer, "notes/a.txt": b"a"}
    save(tmp_path / "c", 1, metadata={"config": config}, files=files)
    (tokenizer / "sub" / "vocab.json").unlink()
    restored = restore(tmp_path / "c")
    assert restored.metadata["config"] == {"train": {"rate": 0.1, "betas": [1, 2]}, "name": "é"}
    assert (restored.folder / "tokenizer/sub/vocab.json").read_bytes() == b"[1]"
    assert (restored.folder / "notes/a.txt").read_bytes() == b"a"


def test_a_part_is_read_without_the_rest(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "step_00000003/state/quantized/0.0").write_bytes(bytes(4 * 64))
    params = restore(tmp_path, state_at(0)["params"], prefix="params").state
    assert_same_bytes(params, state_at(3)["params"])
    assert set(restore(tmp_path, prefix="params").state) == set(params)
    with pytest.raises(NoCheckpointError, match="quantized: SHA-256 differs"):
        restore(tmp_path)
    assert set(restore(tmp_path, prefix=("nothing", "params")).state) == set(params)
    with pytest.raises(StateMismatchError, match="prefix='nothing'"):
        restore(tmp_path, prefix="nothing")


def test_load_numpy_needs_no_structure(tmp_path):
    save(tmp_path, 1, 2)
    loaded = load_numpy(tmp_path, step=1)
    kernel = loaded["params"]["dense"]["kernel"]
    assert type(kernel) is np.ndarray
    np.testing.assert_array_equal(kernel, state_at(1)["params"]["dense"]["kernel"])
    assert loaded["opt"]["0"]["mu"]["k"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["rng"], jax.random.key_data(state_at(1)["rng"]))


def test_another_state_is_refused_leaf_by_leaf(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(1, {"a": jnp.zeros(3), "b": jnp.zeros(3), "key": jax.random.key(0), "d": 1.5})
    wanted = {
        "a": jax.ShapeDtypeStruct((4,), jnp.float32),
        "c": jnp.zeros(3),
        "key": jax.random.key(0, impl="rbg"),
        "d": jnp.zeros((), jnp.bfloat16),
    }
    with pytest.raises(StateMismatchError) as caught:
        restore(tmp_path, wanted)
    assert str(caught.value).splitlines()[1:] == [
        "a: float32[3] in the checkpoint, float32[4] asked for",
        "b: in the checkpoint, not asked for",
        "c: asked for, not in the checkpoint",
        "d: float32[] in the checkpoint, bfloat16[] asked for",
        "key: key<fry>[] in the checkpoint, key<rbg>[] asked for",
    ]


def test_values_beyond_jax_default_precision(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(1, {"a": np.asarray([2**40])})
    assert load_numpy(tmp_path)["a"][0] == 2**40
    with pytest.raises(StateMismatchError, match="a: int64 needs jax_enable_x64"):
        restore(tmp_path, {"a": np.zeros(1, np.int64)})


def test_same_step_again(tmp_path):
    """Equal contents stay as they are; other contents, or a damaged folder, are replaced."""
    save(tmp_path, 5)
    folder = tmp_path / "step_00000005"
    inode = folder.stat().st_ino
    save(tmp_path, 5)
    assert folder.stat().st_ino == inode
    (folder / "state/quantized/0.0").write_bytes(bytes(4 * 64))
    save(tmp_path, 5)
    assert_same_bytes(restore(tmp_path, state_at(0)).state, state_at(5))
    with Saver(tmp_path) as saver:
        saver.save(5, state_at(6))
    assert_same_bytes(restore(tmp_path, state_at(0)).state, state_at(6))
    assert os.listdir(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step=-1; allowed: an integer >= 0"),
        ({"metadata": {"loss": float("nan")}}, ValueError, r"metadata\['loss'\]"),
        ({"metadata": {"f": print}}, TypeError, r"metadata\['f'\]"),
        ({"files": {"../x": b""}}, ValueError, "'../x'"),
        ({"files": {"/x": b""}}, ValueError, "'/x'"),
        ({"files": {"state/x": b""}}, ValueError, "are taken"),
        ({"files": {"x": "no/such/file"}}, ValueError, "no/such/file"),
        ({"state": {"a": np.asarray([print])}}, TypeError, "dtype object"),
    ],
)
def test_bad_arguments_are_refused_before_the_save(tmp_path, arguments, error, message):
    with Saver(tmp_path) as saver:
        with pytest.raises(error, match=message):
            saver.save(**({"step": 1, "state": {"a": 1}} | arguments))
        saver.save(2, {"a": 1})
    assert available_steps(tmp_path) == [2]


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    save(tmp_path, 1)
    assert_same_bytes(restore(tmp_path, state_at(0)).state, state_at(1))


def test_no_checkpoint_at_all(tmp_path):
    assert available_steps(tmp_path / "absent") == []
    with pytest.raises(NoCheckpointError, match="no good checkpoint in"):
        restore(tmp_path / "absent")
    save(tmp_path, 1)
    with pytest.raises(NoCheckpointError, match=r"of step 2 in .*\nsaved steps: \[1\]"):
        restore(tmp_path, step=2)
