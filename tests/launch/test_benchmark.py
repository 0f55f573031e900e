"""python -m launch.benchmark, alone and (pytest -m torch) beside transformers on one checkpoint."""

import json
import re
import subprocess
import sys

import pytest

from jaxlm.interop.write import write_hub_folder
from tests.decoding import tiny

SIZES = ["--batch_size=2", "--prompt_length=12", "--new_tokens=5", "--rounds=2"]


def run(*flags):
    command = [sys.executable, "-m", "launch.benchmark", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", ["train", "decode"])
def test_alone(tmp_path, what):
    sizes = ["--d_model=16", "--num_layers=1", "--num_heads=2", "--vocab_size=64", "--length=16"]
    output = tmp_path / "figures.json"
    result = run(what, *SIZES, *sizes, f"--output={output}")
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    assert figures[f"{what}_tokens_per_second"] > 0 and figures["benchmark"] == what


@pytest.mark.torch
def test_phases_of_a_checkpoint_beside_its_peer(tmp_path):
    pytest.importorskip("transformers")
    write_hub_folder(tmp_path / "hub", tiny.model(), tiny.params(), tiny.TOKENIZER)
    # A tokenizer that a hub folder can have; it is not used.
    tokenizer = {"model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "</s>"}}
    (tmp_path / "hub/tokenizer.json").write_text(json.dumps({"version": "1.0", **tokenizer}))
    for name in ("kind.json", "tokenizer_config.json"):
        (tmp_path / "hub" / name).unlink()
    checkpoint, output = f"--checkpoint={tmp_path / 'hub'}", tmp_path / "figures.json"
    flags = [*SIZES, checkpoint, "--peer=transformers", "--unroll", f"--output={output}"]
    result = run("decode", *flags)
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    for phase in ("prefill", "decode", "generate"):
        for name in ("tokens_per_second", "peer_tokens_per_second", "ratio_to_peer"):
            assert figures[f"{phase}_{name}"] > 0
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
