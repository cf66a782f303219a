"""The house: a module imports only from strictly lower floors, and the library never imports torch or TensorFlow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "core": 0,
    "diffusion": 1,
    "models": 1,
    "data": 1,
    "parallel": 1,
    "convert": 2,
    "training": 2,
    "tasks": 3,
    "pipeline": 4,
    "prepare": 4,
    "eval": 5,
    "plan": 5,
}
FOREIGN = {"torch", "tensorflow", "diffusers", "torchvision"}
MODULES = [*sorted((ROOT / "sdjax").rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room(module: str) -> str | None:
    """The package or file of sdjax that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sdjax" and len(parts) > 1 and parts[1] in FLOORS else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    here = parts[1] if parts[0] == "sdjax" and len(parts) > 1 and parts[1] in FLOORS else None
    floor = FLOORS[here] if here and path.name != "__main__.py" else 6  # a command stands above what it commands
    for name in imported(path):
        there = room(name)
        if there is not None and there != here:
            assert FLOORS[there] < floor, f"{path.name} (floor {floor}) imports {name} (floor {FLOORS[there]})"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_foreign_framework(path: Path):
    assert not {name.split(".")[0] for name in imported(path)} & FOREIGN


def test_every_room_has_a_floor():
    rooms = {p.stem for p in (ROOT / "sdjax").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)
