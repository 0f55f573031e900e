"""What was written in checkpoint format 1 is restored by today's code, to the last bit."""

import jax

from jaxlm.checkpoints import restore, tree_digest
from tests.checkpoints.make_format_1 import FILES, FOLDER, METADATA, fixed_state
from tests.checkpoints.states import assert_same_bytes

DIGEST = "660076d0d2ecf8f4d85f8e7da3a62e6ac5edfdf52c93f8dc761a6e9dce5920d2"


def test_it_is_restored_to_the_known_digest():
    shapes = jax.eval_shape(fixed_state)
    restored = restore(FOLDER, shapes)
    assert (restored.step, restored.digest, restored.metadata) == (30, DIGEST, METADATA)
    assert tree_digest(restored.state)["whole"] == DIGEST
    assert_same_bytes(restored.state, fixed_state())
    assert {name: (restored.folder / name).read_bytes() for name in FILES} == FILES
