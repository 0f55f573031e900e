"""Models by their hub name, through huggingface_hub's own cache; no test needs a network."""

import shutil

import huggingface_hub.constants
import numpy as np
import pytest

import jaxlm
from tests.interop.folders import read_golden, write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds tiny/llama, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "cache" / "models--tiny--llama"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    _, config, shapes = read_golden("llama")
    (model / "snapshots").mkdir()
    return write_folder(model / "snapshots" / COMMIT, config, shapes)


@pytest.mark.parametrize("name", ["tiny/llama", f"tiny/llama@{COMMIT}"])
def test_a_fetched_model_is_loaded_by_name(cache, name):
    model, params, _ = jaxlm.load(name)
    _, want, _ = jaxlm.load(cache)
    assert model.config.num_layers == 3
    np.testing.assert_array_equal(params["embedding"], want["embedding"])


def test_offline_says_so(cache):
    message = r"tiny/gemma: no such file here, and the hub does not give .*allowed: a path, or"
    with pytest.raises(FileNotFoundError, match=message):
        jaxlm.load("tiny/gemma")


def test_what_is_here_is_no_hub_name(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "tiny" / "gemma")
    assert jaxlm.load("tiny/gemma")[0].config.num_layers == 3
    with pytest.raises(FileNotFoundError, match=r"tiny/absent is absent; allowed: the --workdir"):
        jaxlm.load("tiny/absent")
