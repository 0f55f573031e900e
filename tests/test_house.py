"""Rules for the whole repository, each checked where a machine can."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import pytest

import jaxlm
from jaxlm import positions
from jaxlm.positions.encoding import PositionEncoding
from jaxlm.positions.rope_scaling import RopeScaling

ROOT = Path(__file__).parents[1]
TOP = {
    *(".ci", ".gitignore", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"),
    *("configs", "jaxlm", "kernels", "launch", "tests"),
}
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, ARGUMENTS = 500, 60, 12
# Heavy or optional packages, imported where they are used.
LAZY = {
    *("datasets", "gcsfs", "huggingface_hub", "matplotlib", "pyarrow", "sentencepiece"),
    *(
        "gguf",
        "lm_eval",
        "safetensors",
        "tensorboardX",
        "tiktoken",
        "torch",
        "transformers",
        "zstandard",
    ),
}


@functools.cache
def tracked() -> list[str]:
    """Files that git knows or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is unknown")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.splitlines() if (ROOT / name).is_file()]


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def sources(*folders: str) -> list[str]:
    return [n for n in tracked() if n.endswith(".py") and n.startswith(folders)]


def test_top_level_holds_what_it_should():
    assert {name.split("/")[0] for name in tracked()} == TOP


def test_no_path_of_one_machine():
    """Nothing works on one machine only, and no lock file says where its packages came from."""
    absolute = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|mnt|opt|tmp|private)/[\w.]+")
    for name in tracked():
        assert not name.endswith((".lock", "-lock.json", ".egg-info")), name
        if name.startswith("jaxlm/data/texts/"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
        found = absolute.search(text)
        assert found is None, f"{name}: {found and found[0]}"


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_file_and_no_function_is_too_long():
    for name in sources(""):
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert lines <= LINES_OF_A_FILE, f"{name} has {lines} lines"
        for f in functions(parsed(name)):
            size = f.end_lineno - f.lineno + 1
            assert size <= LINES_OF_A_FUNCTION, f"{name}: {f.name} has {size} lines"


@functools.cache
def modules() -> list:
    """All modules of the library, imported."""
    names = [m.name for m in pkgutil.walk_packages(jaxlm.__path__, "jaxlm.")]
    return [importlib.import_module(n) for n in names]


@functools.cache
def classes() -> list[type]:
    found = {}
    for module in modules():
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                found[f"{module.__name__}.{cls.__name__}"] = cls
    return list(found.values())


def test_no_constructor_takes_too_many_arguments():
    checked = set()
    for cls in classes():
        if not dataclasses.is_dataclass(cls) and "__init__" not in vars(cls):
            continue
        names = set(inspect.signature(cls).parameters)
        if issubclass(cls, nn.Module):
            names -= {"name", "parent"}  # Linen's own
        checked.add(cls.__name__)
        assert len(names) <= ARGUMENTS, f"{cls.__name__} takes {len(names)}: {sorted(names)}"
    assert {"ModelConfig", "AttentionConfig", "Transformer", "MetricsWriter"} <= checked


def settings() -> dict[str, type]:
    """Every class a user configures: *Config, position encodings and their scalings."""
    kinds = (PositionEncoding, RopeScaling)
    return {
        f"{c.__module__}.{c.__name__}": c
        for c in classes()
        if dataclasses.is_dataclass(c) and (c.__name__.endswith("Config") or issubclass(c, kinds))
    }


def reads(tree: ast.AST, inside: str = "") -> set[tuple[str, str]]:
    """(class it stands in, attribute) of every attribute that is read.

    Reading a field to validate, print or copy it is no use of it.
    """
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("__post_init__", "bind", "__str__"):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add((inside, node.attr))
        found |= reads(node, node.name if isinstance(node, ast.ClassDef) else inside)
    return found


def test_settings_are_found():
    names = {n.rsplit(".", 1)[1] for n in settings()}
    expected = {
        *("ModelConfig", "AttentionConfig", "MoEConfig", "DataConfig", "SourceConfig", "RunConfig"),
        *("TrainConfig", "OptimizerConfig", "CheckpointConfig", "CompareConfig", "MeshConfig"),
    }
    assert expected <= names
    assert len(names) > len(positions.available()) + len(expected)


def test_every_setting_is_read():
    """An option that no code reads does not exist; a name that others share may slip through, so
    a field of a position encoding must be read by an encoding.
    """
    used = {n: reads(parsed(n)) for n in sources("jaxlm/", "launch/")}
    for full_name, cls in settings().items():
        kinds = issubclass(cls, PositionEncoding | RopeScaling)
        where = [n for n in used if n.startswith("jaxlm/positions/")] if kinds else list(used)
        names = {attribute for n in where for _, attribute in used[n]}
        for field in dataclasses.fields(cls):
            assert field.name in names, f"{full_name}.{field.name} is read by no code"


def test_public_names_are_few_and_documented():
    assert len(set(jaxlm.__all__)) == len(jaxlm.__all__)
    assert 15 <= len(jaxlm.__all__) <= 30
    needed = "ModelConfig Transformer init_params load generate positions evaluate_loss_by_position"
    assert set(needed.split()) <= set(jaxlm.__all__)
    for owner in (jaxlm, positions):
        for name in owner.__all__:
            text = vars(getattr(owner, name)).get("__doc__") or getattr(owner, name).__doc__
            # A dataclass without a docstring gets its signature as one.
            assert text and not text.startswith(f"{name}("), f"{owner.__name__}.{name}"


IMPORT = """
import json, sys, time
import jax, jax.numpy
before = set(sys.modules)
start = time.process_time()
import jaxlm
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({m.split(".")[0] for m in set(sys.modules) - before})]))
"""


def test_import_is_quick_and_pulls_in_little():
    runs = []
    for _ in range(3):
        command = [sys.executable, "-c", IMPORT]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(json.loads(run.stdout))
    heavy = LAZY & set(runs[0][1])
    assert not heavy, heavy
    assert min(seconds for seconds, _ in runs) < 2
