"""The README's table of faults: every row names tests, and there are such tests."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows():
    section = (ROOT / "README.md").read_text().split("## Faults\n")[1].split("\n## ")[0]
    table = section.split("| --- | --- | --- |\n")[1].split("\n\n")[0]
    return table.splitlines(), section


def test_every_fault_names_tests_that_exist():
    lines, section = rows()
    assert len(lines) >= 20
    assert all(TEST.search(line.split(" | ")[-1]) for line in lines)
    for file, name in TEST.findall(section):
        tree = ast.parse((ROOT / file).read_text())
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{file}::{name}"
