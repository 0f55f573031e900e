"""Presets decoded on the pods that they are meant for, compiled ahead of time."""

import importlib

import pytest

from jaxlm.training.run import RunConfig
from launch.compile_decode import Batch, compile_decode

pytestmark = pytest.mark.tpu_aot

LENGTH, ROWS = 8192, 16


@pytest.mark.parametrize(
    ("preset", "topology", "cache"),
    [
        ("llama3_8b", "v5e:2x4", "dense"),
        ("llama3_8b", "v5e:2x4", "quantized(bits=8)"),
        ("llama3_70b", "v6e:4x4", "dense"),
    ],
)
def test_decoding_fits_and_only_tokens_are_exchanged(preset, topology, cache):
    pytest.importorskip("libtpu")
    config = importlib.import_module(f"configs.{preset}").get_config()
    config.mesh.tensor = 8
    run = RunConfig.from_dict(config.to_dict())
    costs, found = compile_decode(run, topology, Batch(ROWS, LENGTH, cache))
    for name, cost in costs.items():
        assert cost.error is None, cost.error
        assert found[name]["hbm_total"] <= 0.95 * cost.chip.device_hbm_bytes
    model = run.model_config(tokenizer_vocab_size=1)
    rows = ROWS // found["mesh"]["data"]
    step = {(e.kind, e.group_size): e for e in costs["step"].exchanges}
    # Two sums of hidden states in bfloat16 a layer: behind attention, and behind the MLP.
    sums = step["all-reduce", 8]
    assert sums.count == pytest.approx(2 * model.num_layers, abs=6)
    assert sums.nbytes == pytest.approx(2 * model.num_layers * rows * model.d_model * 2, rel=0.05)
    # Of all else, the logits of each row are the most.
    rest = sum(e.nbytes for key, e in step.items() if key != ("all-reduce", 8))
    assert rest < 2 * rows * model.vocab_size * 4
