"""Every parameter names its axes, in words that the sharding table knows."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxlm.model.parameters import logical_axes
from jaxlm.model.transformer import Transformer
from jaxlm.sharding.mesh import RULES
from tests.model.configs import CONFIGS, VECTORS, path_name, shapes


def is_spec(x):
    return isinstance(x, PartitionSpec)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_axis_has_a_known_name(name):
    specs = jax.tree_util.tree_leaves_with_path(
        logical_axes(Transformer(CONFIGS[name])), is_leaf=is_spec
    )
    arrays = jax.tree_util.tree_leaves_with_path(shapes(name))
    assert [p for p, _ in specs] == [p for p, _ in arrays]
    for (path, spec), (_, array) in zip(specs, arrays, strict=True):
        what = path_name(path)
        assert len(spec) == array.ndim, what
        assert {n for n in spec if n is not None} <= set(RULES), what
        assert ("layers" in spec) == what.startswith("layers/"), what
        if what.startswith("layers/"):
            assert spec[0] == "layers", what
        if not what.endswith(VECTORS):
            # Whatever is large is cut: some axis lies along a mesh axis.
            assert any(RULES[n] for n in spec if n is not None), what
        placed = [RULES[n] for n in spec if n is not None and RULES[n] is not None]
        assert len(placed) == len(set(placed)), f"{what}: one mesh axis twice"
