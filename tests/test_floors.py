"""The house: modules import only from strictly lower floors, and never torch or TensorFlow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from imports import MODULES, ROOT, edges, imported

FLOORS = {
    "core": 0,
    "ops": 0,
    "diffusion": 1,
    "models": 1,
    "data": 1,
    "parallel": 1,
    "checkpoints": 2,
    "training": 2,
    "diffusion_model": 3,
    "tasks": 4,
    "pipeline": 5,
    "prepare": 5,
    "convert": 6,
    "cli": 6,
    "eval": 6,
    "plan": 6,
    "serve": 7,
}
SCRIPTS = 8
FOREIGN = {"torch", "tensorflow", "diffusers", "torchvision"}
# The rival of a benchmark.
EXCEPTIONS = {"benchmarks/against_diffusers.py": {"torch", "diffusers"}}


def room(module: str) -> str | None:
    """The package or file of sdjax that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sdjax" and len(parts) > 1 and parts[1] in FLOORS else None


def floor_of(path: Path) -> tuple[str | None, int]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    here = parts[1] if parts[0] == "sdjax" and len(parts) > 1 and parts[1] in FLOORS else None
    if parts[0] == "configs":
        return None, 1  # data alone, with the types of core
    # A command stands above what it commands; sdjax/__init__.py opens the pipeline.
    return here, FLOORS[here] if here and path.name != "__main__.py" else SCRIPTS


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    here, floor = floor_of(path)
    for name in imported(path):
        there = room(name)
        if there is not None and there != here:
            assert FLOORS[there] < floor, f"{path.name} (floor {floor}) imports {name} (floor {FLOORS[there]})"
        if name.startswith("benchmarks"):
            assert path.parent.name == "benchmarks", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_foreign_framework(path: Path):
    allowed = EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    assert {name.split(".")[0] for name in imported(path)} & FOREIGN <= allowed


def test_checkpoints_are_six_import_levels_deep():
    """From what imports nothing of the room to what opens a checkpoint."""
    room = {name: others for name, others in edges().items() if name.startswith("sdjax.checkpoints.")}

    def level(name: str) -> int:
        return max((1 + level(other) for other in room[name] if other in room), default=0)

    assert {name: level(name) for name in room if level(name) > 6} == {}


def test_no_function_has_too_many_arguments():
    """Twelve; the options of a call are rows of a table."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) > 12
    ]
    assert found == []


def test_every_room_has_a_floor():
    rooms = {p.stem for p in (ROOT / "sdjax").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)
