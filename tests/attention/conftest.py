"""What tests of the decode kernel's door share."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.attention import decode, decode_zones


@pytest.fixture
def on_tpu(monkeypatch):
    """Decoding as traced for a TPU, and run by its interpreter."""
    for door in (decode, decode_zones):
        monkeypatch.setattr(door, "target_chip", lambda: "v5e")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield
