"""The house: modules import only from strictly lower floors, in no circles, and never torch or TensorFlow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
}
SCRIPTS = 7
FOREIGN = {"torch", "tensorflow", "diffusers", "torchvision"}
# Read in their own process of reading: PyTorch's restricted loader of `.ckpt`, and the rival of a benchmark.
EXCEPTIONS = {
    "sdjax/checkpoints/storage/weights.py": {"torch"},
    "benchmarks/against_diffusers.py": {"torch", "diffusers"},
}
MODULES = [path for folder in ("sdjax", "benchmarks", "configs") for path in sorted((ROOT / folder).rglob("*.py"))] + [
    ROOT / "train.py",
    ROOT / "sample.py",
]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, at the top or inside a function, or names in a call of importlib."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(_named(node.args[0]))
    return names


def _named(argument: ast.expr) -> set[str]:
    """Modules that an argument of import_module may mean; of an f-string, all that its beginning fits."""
    if isinstance(argument, ast.Constant):
        return {str(argument.value)}
    beginning = argument.values[0] if isinstance(argument, ast.JoinedStr) else None
    if isinstance(beginning, ast.Constant):
        return {name for path in MODULES if (name := module_name(path)).startswith(str(beginning.value))}
    return set()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def type_checking_only(path: Path) -> set[str]:
    """Modules that a file imports for type checkers alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    names.add(inner.module or "")
                    names.update(f"{inner.module}.{alias.name}" for alias in inner.names)
    return names


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


def test_no_circles():
    """Of files: of two that import each other, neither can be read first. Imports for type checkers do not count."""
    files = {module_name(path): path for path in MODULES}
    edges = {
        name: {other for other in imported(path) - type_checking_only(path) if other in files and other != name}
        for name, path in files.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name in done:
            return
        for other in edges[name]:
            visit(other, (*above, name))
        done.add(name)

    for name in files:
        visit(name, ())


def test_checkpoints_are_five_import_levels_deep():
    """From what imports nothing of the room to what opens a checkpoint."""
    files = {module_name(path): path for path in MODULES if "checkpoints" in path.parts and path.name != "__init__.py"}
    edges = {name: imported(path) - type_checking_only(path) for name, path in files.items()}

    def level(name: str) -> int:
        return max((1 + level(other) for other in edges[name] if other in files and other != name), default=0)

    assert {name: level(name) for name in files if level(name) > 5} == {}


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
