"""python -m launch.benchmark, alone and (pytest -m torch) beside transformers on one checkpoint."""

import itertools
import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm.checkpoints import Saver
from jaxlm.checkpoints.digest import leaf_digest
from jaxlm.interop.write import write_hub_folder
from launch import benchmark_load, benchmark_save
from tests.decoding import tiny
from tests.interop.folders import read_golden, write_folder
from tests.marks import slow_but

SIZES = ["--batch_size=2", "--prompt_length=12", "--new_tokens=5", "--rounds=2"]


def run(*flags):
    command = [sys.executable, "-m", "launch.benchmark", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", slow_but(["train"], ["train", "decode"]))
def test_alone(tmp_path, what):
    sizes = ["--d_model=16", "--num_layers=1", "--num_heads=2", "--vocab_size=64", "--length=16"]
    output = tmp_path / "a folder" / "figures.json"
    result = run(what, *SIZES, *sizes, f"--output={output}")
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    assert figures[f"{what}_tokens_per_second"] > 0 and figures["benchmark"] == what


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--output=/dev/null/x.json", "error: [Errno 17] File exists: '/dev/null'"),
        pytest.param(
            *("--methods=a],[b", "error: methods='a],[b'; allowed: name,name(option=value)"),
            marks=pytest.mark.slow,
        ),
        ("--methods=greedy()", "allowed: beam, contrastive; or greedy"),
    ],
)
def test_bad_flags_are_told_before_anything_is_measured(flag, told):
    result = run("decode", flag, "--d_model=16", "--num_heads=2")
    assert result.returncode == 1 and told in result.stderr and result.stderr.count("\n") == 1


def test_load(tmp_path):
    _, config, shapes = read_golden("llama")
    folder = write_folder(tmp_path / "hub", config, shapes)
    figures = benchmark_load.measure(str(folder), 1, None)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    assert figures["parameters MiB"] == 4 * numbers / 2**20
    assert figures["seconds"] > 0 and figures["of copying as many bytes"] > 0
    assert "ratio" not in figures
    with pytest.raises(ValueError, match="absent"):
        benchmark_load.measure(str(tmp_path / "absent.gguf"), 1, None)


def test_save():
    figures = benchmark_save.measure(
        lambda: time.sleep(0.01), lambda: {"w": np.zeros(2**18, np.float32)}, 2
    )
    assert figures["state MiB"] == 1 and figures["ms a step"] >= 10
    # Sleep takes no time from a save, nor a save from sleep: only the snapshot and the last wait.
    assert 0 < figures["seconds added"] < figures["seconds of a save"]
    assert figures["of a minute"] == figures["seconds added"] / 60


def test_what_digests_take_of_a_restore(tmp_path, monkeypatch):
    """A second here, beside a restore of 16 bytes, which takes less even on a busy machine."""
    with Saver(tmp_path) as saver:
        saver.save(1, {"w": np.zeros(4, np.float32)})

    def slow(*arguments):
        time.sleep(1)
        return leaf_digest(*arguments)

    monkeypatch.setattr("jaxlm.checkpoints.verify.leaf_digest", slow)
    figures = benchmark_save.restore_figures(tmp_path, 1, 1)
    assert figures["seconds of a restore"] >= 1 and 0.5 < figures["of it SHA-256"] < 1


@pytest.mark.slow
def test_methods_on_caches(tmp_path):
    sizes = ["--d_model=16", "--num_layers=1", "--num_heads=2", "--vocab_size=64"]
    methods, kinds = ["greedy", "beam(num_beams=2)"], ["dense", "ring(window=4, num_sinks=1)"]
    output = tmp_path / "table.json"
    flags = [f"--methods={','.join(methods)}", f"--caches={','.join(kinds)}", f"--output={output}"]
    result = run("decode", *SIZES, *sizes, *flags)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())
    pairs = [(row["method"], row["cache"]) for row in rows]
    assert pairs == list(itertools.product(methods, kinds))
    plain, ringed, beam, _ = rows
    assert plain["agreement"] == 1 and plain["loss_change"] == 0 and plain["tokens_per_call"] == 1
    # Keys and values of 16 float32 numbers, in one layer, of 17 tokens; a ring this small keeps all
    # of them, in a multiple of 8 slots.
    assert plain["cache_bytes_per_token"] == 2 * 16 * 4
    assert ringed["cache_bytes_per_token"] == 2 * 16 * 4 * 24 / 17
    assert ringed["loss_change"] != 0
    assert beam["log_prob"] != plain["log_prob"] and beam["agreement"] < 1
    result = run("decode", *SIZES, *sizes, "--methods=bean")
    assert result.returncode == 1
    told = r"error: method='bean' \(did you mean beam\?\); allowed: .*\n"
    assert re.fullmatch(told, result.stderr)


@pytest.mark.torch
def test_phases_of_a_checkpoint_beside_its_peer(tmp_path):
    pytest.importorskip("transformers")
    write_hub_folder(tmp_path / "hub", tiny.model(), tiny.params(), tiny.TOKENIZER)
    # A tokenizer that a hub folder can have; it is not used.
    tokenizer = {"model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "</s>"}}
    (tmp_path / "hub/tokenizer.json").write_text(json.dumps({"version": "1.0", **tokenizer}))
    for name in ("kind.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "hub" / name).unlink()
    checkpoint, output = f"--checkpoint={tmp_path / 'hub'}", tmp_path / "figures.json"
    flags = [*SIZES, checkpoint, "--peer=transformers", "--unroll", f"--output={output}"]
    result = run("decode", *flags)
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    for phase in ("prefill", "decode", "generate"):
        for name in ("tokens_per_second", "peer_tokens_per_second", "ratio_to_peer"):
            # What decoding took is a difference of two times: of a tiny model on a busy machine it
            # may be anything.
            assert figures[f"{phase}_{name}"] > 0 or phase == "decode"
    assert figures["decode_gb_per_second"] > 0 and figures["copy_gb_per_second"] > 0
    assert figures["peer"]["name"].startswith("transformers")
    for what, flag, message in [
        ("train", "--rounds=1", "error: checkpoint='.*hub'; allowed: with decode\n"),
        (
            "decode",
            "--d_model=8",
            "error: d_model=8 beside checkpoint='.*'; allowed: one of them\n",
        ),
    ]:
        result = run(what, flag, checkpoint)
        assert result.returncode == 1
        assert re.fullmatch(message, result.stderr)
