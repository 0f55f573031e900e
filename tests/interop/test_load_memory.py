"""What loading takes beyond the model itself: less than 1.3 of its largest tensor."""

import subprocess
import sys

import gguf
import pytest

from tests.interop.folders import read_golden, write_folder
from tests.interop.gguf_files import write_gguf

# Reports bytes: of the parameters, of the largest, and of the heap's peak beyond what was there.
PROGRAM = """
import re, sys, threading, time
import gguf, jax, jax.numpy as jnp, safetensors.numpy, tokenizers
import jaxlm

def heap():  # pages of the file that is read are the system's to take back
    text = open("/proc/self/status").read()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", text)[1])

jnp.zeros(8).block_until_ready()
before, peak, done = heap(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, heap())

watcher = threading.Thread(target=watch, daemon=True)  # an error ends the process
watcher.start()
_, params, _ = jaxlm.load(sys.argv[1])
jax.block_until_ready(params)
done.set()
watcher.join()
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(sum(sizes), max(sizes), peak - before)
"""
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "head_dim": 64}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 65536}


def shapes_of(config):
    d, ff, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (rows, d), "lm_head.weight": (rows, d)}
    shapes["model.norm.weight"] = (d,)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (ff, d) for n in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (d, ff)
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (512, d) for n in ("q", "o")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (256, d) for n in ("k", "v")}
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "F32", "Q8_0"])
def test_the_host_holds_one_tensor_at_a_time(kind, tmp_path):
    config = read_golden("llama")[1] | LARGE
    if kind == "safetensors":
        path = write_folder(tmp_path / "hub", config, shapes_of(config))
    else:
        stored = gguf.GGMLQuantizationType[kind]
        path = write_gguf(tmp_path / "m.gguf", config, shapes_of(config), stored)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    total, largest, peak = map(int, run.stdout.split())
    assert largest == 4 * 512 * 65536
    above = (peak - total) / largest
    print(f"{kind}: {above:.2f} of the largest tensor above the model")
    assert above < 1.3
