"""Counts what the glossary of CONTRIBUTING forbids: python tests/words.py prints each offence with its place.

- docstrings whose first word asks or points (What, Which, Whether, Where, How, Of, As);
- a class name that stands for two classes;
- words of another dialect in names of modules, functions, classes, arguments and variables;
- files that import each other, directly or around a corner.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator

from imports import MODULES, ROOT, circles

OPENINGS = re.compile(r"(What|Which|Whether|Where|How|Of|As)\b")
# The field's word for each: CONTRIBUTING has the list.
FORBIDDEN = {
    "asked",
    "paint",
    "painted",
    "picture",
    "pictures",
    "placer",
    "rehearsal",
    "silent",
    "specimen",
    "teller",
    "tellers",
    "told",
    "uncond",
}


def documented(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and docstring of a module, and of its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of what a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def words(name: str) -> set[str]:
    """`wrapNetwork` and `wrap_network` are wrap, network."""
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


@functools.cache
def offences() -> dict[str, list[str]]:
    """Places by kind."""
    found: dict[str, list[str]] = {"openings": [], "class names": [], "words": []}
    classes = defaultdict(list)
    for path in MODULES:
        tree, place = ast.parse(path.read_text()), path.relative_to(ROOT)
        found["openings"] += [
            f"{place}:{line}: {text.splitlines()[0]}" for line, text in documented(tree) if OPENINGS.match(text)
        ]
        found["words"] += [f"{place}:{line}: {name}" for line, name in names(tree) if words(name) & FORBIDDEN]
        found["words"] += [f"{place}: the module's name"] if words(path.stem) & FORBIDDEN else []
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(f"{place}:{node.lineno}")
    found["class names"] = [f"{name}: {', '.join(places)}" for name, places in classes.items() if len(places) > 1]
    return found | {"import circles": circles()}


def main() -> None:
    for kind, places in offences().items():
        print(f"{len(places)} {kind}", *places, sep="\n  ")
    sys.exit(any(offences().values()))


if __name__ == "__main__":
    main()
