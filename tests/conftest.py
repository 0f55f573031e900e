"""Strict settings for every test: promotion raises, warnings are errors, shapes are checked."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA takes longer to optimize programs as small as the tests' than they take to run.
FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # a flag that later ones do not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Many tests, and the processes they start, compile the same programs.
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  the hook looks it up by name

# Before the first import of the package: every annotated function then checks its arguments.
install_import_hook("jaxlm", "tests.typechecker.check")

import hypothesis
import jax
import pytest

# Tracing makes many objects that live long; to look through them all so often takes a twentieth of
# the suite's time.
gc.set_threshold(200_000, 50, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "jaxlm", deadline=None, max_examples=20, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("jaxlm")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every program holds memory mappings, of which a process may have 65,530 and no more."""
    yield
    jax.clear_caches()
