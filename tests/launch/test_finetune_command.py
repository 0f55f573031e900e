"""An adapter of a trained run from the command line, on four devices, and converted both ways."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.adapters.lora import merge_adapters
from jaxlm.training.metrics import read_metrics

STEPS = 4
pytestmark = pytest.mark.slow


def run(launcher, module, *flags, devices=1):
    command = [sys.executable, "-m", f"launch.{module}", *map(str, flags)]
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = {**launcher.env, "XLA_FLAGS": xla}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finetune(launcher, base, workdir, *flags, devices=1):
    run(
        launcher,
        "train",
        "--config=configs/finetune.py",
        f"--workdir={workdir}",
        f"--config.finetune.checkpoint={base}",
        "--config.finetune.adapter.rank=4",
        "--config.finetune.adapter.targets=attention/.*",
        "--config.finetune.quantize=int8",
        f"--config.data.sources={launcher.texts}/one.txt",
        f"--config.data.held_out={launcher.texts}/held_out.txt",
        "--config.data.sequence_length=32",
        f"--config.train.steps={STEPS}",
        "--config.train.optimizer.warmup_steps=0",
        "--config.train.log_every=1",
        "--config.model.dropout=0.0",
        "--config.model.position_encoding=rope(base=20000)",
        *flags,
        devices=devices,
    )
    return workdir


def test_it_learns_on_a_mesh_what_it_learns_on_one_device_and_is_converted(
    launcher, reference, tmp_path
):
    base, _ = reference
    one = finetune(launcher, base, tmp_path / "one")
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    four = finetune(launcher, base, tmp_path / "four", *mesh, devices=4)
    losses = [[r["loss"] for r in read_metrics(w) if "loss" in r] for w in (one, four)]
    assert len(losses[0]) == STEPS
    # float32 sums in another order, over four steps
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert json.loads((four / "config.json").read_text())["base"]

    run(launcher, "convert", f"--checkpoint={four}", f"--output={tmp_path / 'merged'}")
    said = run(
        launcher,
        *("convert", f"--checkpoint={four}", f"--output={tmp_path / 'lora'}"),
        *("--adapter", "--base=owner/name"),
    )
    assert "an adapter of k_proj, o_proj, q_proj, v_proj of owner/name" in said
    assert "learned under rope(base=20000), which owner/name must be given too" in said
    assert "adapter" in run(launcher, "inspect", four)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    (_, params, _), (_, merged, _) = map(jaxlm.load, (four, tmp_path / "merged"))
    jax.tree.map(np.testing.assert_array_equal, merge_adapters(params), merged)
