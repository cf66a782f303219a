"""The list of the longest tests names tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_name_is_a_tests():
    names = [line for line in (ROOT / "tests/long.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert names == sorted(set(names))
    paths = [name.split("[")[0].split("::") for name in names]
    places = {(path[0], path[-1]) for path in paths}  # a class may stand between
    defined = {
        (file, node.name)
        for file in {file for file, _ in places}
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert places - defined == set()
