"""To be run on eight devices: what is drawn on a mesh is what is drawn on one; prints how
each cache is cut and the most that a step of decoding moves, as JSON.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp

from jaxlm.decoding import engine
from jaxlm.decoding.generate import complete
from jaxlm.decoding.request import make_request
from jaxlm.model.parameters import parameter_shardings
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.training.compiles import count_compiles
from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
PROMPTS = [[5, 70, 9], [3, 3, 8, 120, 77, 6, 1], [40] * 20, [7] * 8] * 2
NEW = 12
DRAWN = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "n": 2}
COLLECTIVE = (
    r"= \(?\w+\[([\d,]*)\][^ ]* (?:all-[\w-]+|reduce-scatter|collective-permute)(?:-start)?\("
)


def said(params, cache, **settings):
    given = (tiny.model(), params, tiny.TOKENIZER, PROMPTS, NEW)
    return [c.token_ids for c in complete(*given, cache=cache, **settings)]


def part_of(x):
    """Numbers on one device."""
    return x.addressable_shards[0].data.size


def of_loop(params, cache):
    """What the loop of decoding takes, from the state after the prompts."""
    model = tiny.model()
    request = make_request(model, tiny.TOKENIZER, PROMPTS, NEW, {}, cache)
    state = request.start(model, params)
    rest = (jnp.asarray(NEW), request.sampling, jnp.asarray(request.stop_tokens))
    program = engine.decode.lower(model, params, state, *rest).compile()
    shapes = re.findall(COLLECTIVE, program.as_text())
    leaves = jax.tree.leaves(state.cache)
    largest = max(leaves, key=lambda x: x.size)
    return {
        "parts": largest.size // part_of(largest),
        "largest": largest.size,
        "moved": max(math.prod(map(int, filter(None, dims.split(",")))) for dims in shapes),
        "aliased": program.memory_analysis().alias_size_in_bytes,
        "bytes": sum(part_of(x) * x.dtype.itemsize for x in leaves),
    }


def main(*names: str) -> None:
    params, found = tiny.params(), {}
    settings = {name: SETTINGS[name] for name in names}
    alone = {cache: said(params, text) for cache, text in settings.items()}
    ways = (DRAWN, {"method": "beam(num_beams=2)"})
    others = [said(params, "dense", **way) for way in ways]
    mesh = make_mesh(MESH)
    placed = jax.device_put(params, parameter_shardings(tiny.model(), mesh))
    with jax.set_mesh(mesh):
        for cache, text in settings.items():
            assert said(placed, text) == alone[cache], cache
            found[cache] = of_loop(placed, text)
            with count_compiles() as compiles:
                said(placed, text)
            assert not sum(compiles.values()), cache
        assert [said(placed, "dense", **way) for way in ways] == others
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
