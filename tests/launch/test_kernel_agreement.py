"""The command that shows whether kernels agree with plain jnp says so when they do not."""

import jax.numpy as jnp
import pytest

from launch import kernel_agreement
from launch.kernel_agreement_call import Agreement
from launch.kernel_cases import CASES


def test_largest_error():
    found = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([10.0])}
    assert kernel_agreement.largest_error((found, found)) == 0
    wanted = {"a": jnp.array([1.5, 2.0]), "b": jnp.array([10.0])}
    assert kernel_agreement.largest_error((found, wanted)) == 0.25
    unwritten = {"a": jnp.array([jnp.nan, 2.0]), "b": jnp.array([10.0])}
    assert kernel_agreement.largest_error((unwritten, wanted)) == float("inf")


@pytest.mark.parametrize(("error", "good"), [(1e-6, True), (1e-4, False)])
def test_status(monkeypatch, capsys, error, good):
    one = Agreement("a kernel", "a call", lambda dtype: (jnp.array([1 + error]), jnp.array([1.0])))
    monkeypatch.setattr(kernel_agreement, "AGREEMENTS", (one,))
    if good:
        kernel_agreement.main([])
    else:
        with pytest.raises(SystemExit):
            kernel_agreement.main([])
    assert "a kernel" in capsys.readouterr().out


def test_each_case_has_its_kernels_agreement():
    for case in CASES:
        if case.function is not None:
            assert case.kernels and kernel_agreement.chosen(sorted(case.kernels))
    (one,) = kernel_agreement.chosen(["cross_entropy"])
    assert one.kernel == "cross_entropy"
    with pytest.raises(ValueError, match="kernel='crossentropy'; allowed: flash_attention, block"):
        kernel_agreement.chosen(["crossentropy"])
