"""How long a checkpoint takes to load, and in how much memory: in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Figures of one load, as JSON. Memory is the process's own: the file's pages are the system's to
# take back.
OURS = """
import json, re, sys, threading, time
import jax, jax.numpy as jnp
import jaxlm
from jaxlm.training.flops import copy_bandwidth

def own():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

jnp.zeros(8).block_until_ready()
before, peak, done = own(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], own())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
start = time.perf_counter()
params = jaxlm.load(sys.argv[1])[1]
jax.block_until_ready(params)
seconds = time.perf_counter() - start
done.set()
watcher.join()
sizes = [x.nbytes for x in jax.tree.leaves(params)]
copy = sum(sizes) / copy_bandwidth()
print(json.dumps({"seconds": seconds, "parameters": sum(sizes), "largest": max(sizes),
                  "peak": peak[0] - before, "copy_seconds": copy}))
"""
PEER = """
import json, os, sys, time
import torch, transformers

path = sys.argv[1]
given = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
folder = os.path.dirname(path) if given else path
start = time.perf_counter()
transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
transformers.AutoTokenizer.from_pretrained(folder, **given)
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def _once(python: str, program: str, checkpoint: str) -> dict[str, float]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, "-P", "-c", program, str(Path(checkpoint).resolve())]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"{checkpoint}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(checkpoint: str, rounds: int, peer_python: str | None) -> dict[str, Any]:
    """Medians over `rounds` loads, of us and of transformers in turn.

    Args:
        checkpoint: as of `jaxlm.load`.
        peer_python: interpreter with torch and transformers; None: no peer.

    Raises:
        ValueError: it does not load.
    """
    ours, peers = [], []
    for _ in range(rounds):
        ours.append(_once(sys.executable, OURS, checkpoint))
        if peer_python is not None:
            peers.append(_once(peer_python, PEER, checkpoint)["seconds"])
    seconds = [one["seconds"] for one in ours]
    peak = statistics.median(one["peak"] for one in ours)
    parameters, largest = ours[0]["parameters"], ours[0]["largest"]
    figures: dict[str, Any] = {
        "benchmark": "load",
        "checkpoint": checkpoint,
        "seconds": statistics.median(seconds),
        "of copying as many bytes": statistics.median(
            one["seconds"] / one["copy_seconds"] for one in ours
        ),
        "parameters MiB": parameters / 2**20,
        "peak MiB": peak / 2**20,
        "peak above them, of the largest tensor": (peak - parameters) / largest,
    }
    if peers:
        ratios = [peer / own for peer, own in zip(peers, seconds, strict=True)]
        figures |= {"peer seconds": statistics.median(peers), "ratio": statistics.median(ratios)}
    return figures
