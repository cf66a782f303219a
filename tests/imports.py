"""The import graph of the project, read from its files: what each imports, at the top or inside a function."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


def edges() -> dict[str, set[str]]:
    """The files that each file imports, by module; imports for type checkers do not count."""
    files = {module_name(path): path for path in MODULES}
    return {name: (imported(path) - type_checking_only(path)) & set(files) - {name} for name, path in files.items()}


def circles() -> list[str]:
    """Files that import each other, of which neither can be read first."""
    graph, done, found = edges(), set[str](), list[str]()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            found.append(" -> ".join((*above[above.index(name) :], name)))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found
