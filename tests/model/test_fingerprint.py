"""The frozen programs; see fingerprint.py for how to renew them."""

import json
import os
import subprocess
import sys

import pytest

from tests.model import fingerprint


def test_the_program_is_the_frozen_one():
    """In a process of its own: what other tests set or cached must not matter."""
    stored = json.loads(fingerprint.STORED.read_text())
    if fingerprint.version() not in stored:
        pytest.skip(f"frozen for jax {', '.join(stored)}, not {fingerprint.version()}")
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.fingerprint"],
        env={n: v for n, v in os.environ.items() if not n.startswith(("XLA_", "JAX_"))}
        | {"JAX_PLATFORMS": "cpu"},
        cwd=fingerprint.STORED.parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)[fingerprint.version()]
    changed = [n for n, value in found.items() if stored[fingerprint.version()].get(n) != value]
    assert not changed, (
        "the arithmetic of these models changed: if that is meant, run "
        "`python -m tests.model.fingerprint --update` with each version of jax"
    )
    assert set(found) == set(stored[fingerprint.version()])
