"""`jaxlm.generate` on a pod that is not there: memory, exchanges, bounds of time.

Of two programs: what reads the prompts, and one step of the loop behind them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from jaxlm import caches
from jaxlm.training.flops import decode_flops_per_token, prefill_flops
from jaxlm.training.run import RunConfig
from launch.aot.pod import PodCost, measure_pod
from launch.aot.static_cost import describe
from launch.compile_train import mesh_sizes
from launch.pod_programs import NEW_TOKENS, decoding_config
from launch.pod_table import bound_table, exchange_table, memory_table

# Of the arguments of both programs by their first two names, see launch.pod_programs: the model is
# the first one, parameters are the second.
PARAMS, CACHES = "1.", ("2.cache", "3.")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts.

    Attributes:
        rows: of all devices.
        length: tokens of each.
        cache: of them and `NEW_TOKENS` more.
    """

    rows: int
    length: int
    cache: str


def compile_decode(
    run: RunConfig, topology: str, batch: Batch
) -> tuple[dict[str, PodCost], dict[str, Any]]:
    """What "prefill" and "step" take, and the figures as JSON knows them.

    Raises:
        ValueError: an unknown topology or cache, a mesh that does not fit.
    """
    run.check_model()
    mesh = mesh_sizes(run.mesh, describe(topology)["devices"])
    settings = {**run.to_dict(), "model": run.model}
    kwargs = {"run": settings, **dataclasses.asdict(batch)}
    kind = caches.parse(batch.cache)
    config = decoding_config(settings)
    keeps_all = kind.init(config, 1, 1).mask is None
    flops = {
        "prefill": batch.rows * prefill_flops(config, batch.length, keeps_all),
        "step": batch.rows * decode_flops_per_token(config),
    }
    programs = {"prefill": "prefill_prompts", "step": "decode_step"}
    costs = {
        name: measure_pod(f"launch.pod_programs:{program}", kwargs, topology, mesh)
        for name, program in programs.items()
    }
    tokens = {"prefill": batch.rows * batch.length, "step": batch.rows}
    found = {n: _figures(cost, flops[n], tokens[n]) for n, cost in costs.items()}
    return costs, {"mesh": mesh, **dataclasses.asdict(batch), **found}


def _figures(cost: PodCost, flops: float, tokens: int) -> dict[str, Any]:
    """Of one program, the derived ones too."""
    found = {**dataclasses.asdict(cost), "fits": cost.fits}
    if cost.memory is None:
        return found
    seconds = cost.seconds(flops)
    least = max(seconds.values())
    return found | {
        "hbm_total": cost.memory.total,
        "cache_bytes": sum(n for name, n in cost.held.items() if name.startswith(CACHES)),
        "model_flops": flops,
        "seconds": seconds,
        "least_seconds": least,
        "most_tokens_per_second": tokens / least,
        "without_overlap_tokens_per_second": tokens / sum(seconds.values()),
    }


def print_decode(costs: dict[str, PodCost], found: dict[str, Any], out: Console) -> None:
    """Three tables of each program, or why there are none."""
    axes = " × ".join(f"{name}={size}" for name, size in found["mesh"].items())
    rows, length, cache = (found[field.name] for field in dataclasses.fields(Batch))
    about = f"{rows} rows of {length:,} tokens, and {NEW_TOKENS} more of each, in {cache!r}"
    for name, cost in costs.items():
        out.rule(f"{name} on {cost.topology}: {axes}; {about}")
        if cost.memory is None:
            out.print(f"does not compile: {cost.error}", markup=False, highlight=False)
            continue
        out.print(memory_table(cost, _part_of))
        out.print(exchange_table(cost))
        told = {
            "tokens a second, at most": f"{found[name]['most_tokens_per_second']:,.0f}",
            "the same if nothing overlaps": (
                f"{found[name]['without_overlap_tokens_per_second']:,.0f}"
            ),
        }
        out.print(bound_table(found[name]["seconds"], told))


def _part_of(name: str) -> str:
    if name.startswith(PARAMS):
        return "parameters"
    return "cache" if name.startswith(CACHES) else "prompts and what is drawn"
