"""The training step of a config on a pod that is not there: memory, exchanges, bounds of time."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from jaxlm.sharding.mesh import MeshConfig
from jaxlm.training.flops import train_flops_per_token
from jaxlm.training.run import RunConfig
from launch.aot.pod import PodCost, measure_pod
from launch.aot.static_cost import describe
from launch.pod_table import bound_table, exchange_table, memory_table

# Of launch.pod_programs.train_step's arguments.
PARTS = {
    "0.params": "parameters",
    "0.optimizer": "optimizer",
    "0.ema": "averaged parameters",
    "0.step": "counters",
    "0.bad_steps": "counters",
}
OTHER = "batch"


def mesh_sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of all axes on so many devices.

    Raises:
        ValueError: no size of data fits.
    """
    sizes = dataclasses.asdict(mesh)
    inner = mesh.fsdp * mesh.context * mesh.tensor
    sizes["data"] = mesh.data or max(devices // inner, 1)
    if sizes["data"] * inner != devices:
        told = " × ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh: {told} = {sizes['data'] * inner}; allowed: sizes whose product is the number "
            f"of devices, {devices}"
        )
    return sizes


def compile_train(run: RunConfig, topology: str) -> tuple[PodCost, dict[str, Any]]:
    """What one step takes, and the figures as JSON knows them.

    Raises:
        ValueError: an unknown topology, a mesh that does not fit it or the config.
    """
    if run.finetune is not None or run.compare is not None:
        raise ValueError("finetune or compare is set; allowed: None, the run of one fresh model")
    run.check_model()
    mesh = mesh_sizes(run.mesh, describe(topology)["devices"])
    settings = {**run.to_dict(), "model": run.model}
    cost = measure_pod("launch.pod_programs:train_step", {"run": settings}, topology, mesh)
    return cost, figures(run, cost, mesh)


def figures(run: RunConfig, cost: PodCost, mesh: dict[str, int]) -> dict[str, Any]:
    """All figures, the derived ones too."""
    found = {**dataclasses.asdict(cost), "mesh": mesh, "fits": cost.fits}
    if cost.memory is None:
        return found
    length, rows = run.data.sequence_length, run.data.batch_size
    config = run.model_config(tokenizer_vocab_size=1)
    flops = train_flops_per_token(config, length) * rows * length
    seconds = cost.seconds(flops)
    least = max(seconds.values())
    return found | {
        "hbm_total": cost.memory.total,
        "model_flops": flops,
        "seconds": seconds,
        "least_step_seconds": least,
        "most_tokens_per_second": rows * length / least,
        "most_model_flops_share": seconds["arithmetic"] / least,
        "without_overlap_model_flops_share": seconds["arithmetic"] / sum(seconds.values()),
    }


def print_train(run: RunConfig, cost: PodCost, found: dict[str, Any], out: Console) -> None:
    """Three tables, or why there are none."""
    if cost.memory is None:
        out.print(f"does not compile: {cost.error}", markup=False, highlight=False)
        return
    axes = " × ".join(f"{name}={size}" for name, size in found["mesh"].items())
    rows, length = run.data.batch_size, run.data.sequence_length
    out.print(f"{cost.topology}: {axes}; {rows} rows of {length:,} tokens a step", highlight=False)
    out.print(memory_table(cost, lambda name: PARTS.get(name, OTHER)))
    out.print(exchange_table(cost))
    about = {
        "tokens a second, at most": f"{found['most_tokens_per_second']:,.0f}",
        "model FLOPs of peak, at most": f"{found['most_model_flops_share']:.0%}",
        "the same if nothing overlaps": f"{found['without_overlap_model_flops_share']:.0%}",
    }
    out.print(bound_table(found["seconds"], about))
    for note in cost.notes:
        out.print(note, markup=False, highlight=False)
