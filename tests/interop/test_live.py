"""The same comparisons with transformers itself, live (pytest -m torch, with torch installed).

What jaxlm writes loads in transformers and gives jaxlm's logits; no golden is involved.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.interop.write import write_hub_folder
from tests.interop.folders import GOLDENS, read_golden, write_folder
from tests.interop.make_goldens import SDPA

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("case", GOLDENS)
def test_what_is_written_loads_in_transformers(case, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file, config, shapes = read_golden(case)
    model, params, tokenizer = jaxlm.load(write_folder(tmp_path / "hub", config, shapes))
    architecture = config["architectures"][0]
    write_hub_folder(tmp_path / "out", model, params, tokenizer, architecture)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        attn_implementation="sdpa" if case in SDPA else "eager",
        experts_implementation="eager",
        dtype="float32",
        output_loading_info=True,
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(theirs).__name__ == architecture
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(file["tokens"])).logits.numpy()
    got, _ = model.apply({"params": params}, jnp.asarray(file["tokens"], jnp.int32))
    # float32 sums in another order, over three layers: 1e-4 of the largest logit.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
