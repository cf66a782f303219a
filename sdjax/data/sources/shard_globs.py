"""The files that a pattern names: comma lists, brace ranges as a shell writes them, and globs."""

from __future__ import annotations

import glob
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

from sdjax.core.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_FILES = 1_000_000


def files(pattern: str) -> list[Path]:
    """Every file that a pattern names, in the pattern's order, a glob's sorted; missing ones, too.

    A glob that matches nothing stands for itself.

    Args:
        pattern: e.g. `shards/{000000..000127}.tar`, `a/*.tar,b/*.tar` or `{train,extra}/0.tar`; `~` is the home folder.

    Raises:
        UserError: nothing is named, a file twice, or a folder, or a range cannot be understood.
    """
    found: list[Path] = []
    for part in _split(pattern):
        for name in _braces(part):
            path = Path(name).expanduser()
            found += [path] if path.is_file() or not glob.has_magic(name) else _glob(path) or [path]
    if not found:
        raise UserError(f"{pattern!r} names no files")
    folder = next((path for path in found if path.is_dir()), None)
    if folder is not None:
        raise UserError(f"{pattern!r} names the folder {folder}; did you mean the files in it, {folder}/*?")
    twice = next((path for path, same in itertools.groupby(sorted(found)) if len(list(same)) > 1), None)
    if twice is not None:
        raise UserError(f"{pattern!r} names {twice} twice")
    return found


def split_pattern(pattern: str, split: str) -> str:
    """The pattern of a split: `{split}` in it is replaced; one without holds `train` only.

    Raises:
        UserError: another split of a pattern without `{split}`.
    """
    if "{split}" not in pattern and split != "train":
        raise UserError(f"no split {split!r} in {pattern!r}: write {{split}} where its name stands in the path")
    return pattern.replace("{split}", split)


def _glob(path: Path) -> list[Path]:
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]


def _split(pattern: str) -> list[str]:
    """At the commas that stand outside braces."""
    parts = re.findall(r"(?:\{[^{}]*\}|[^,])+", pattern)
    return [part.strip() for part in parts if part.strip()]


def _braces(text: str) -> list[str]:
    literals, choices = BRACES.split(text)[::2], [_choices(inner, text) for inner in BRACES.findall(text)]
    if math.prod(len(choice) for choice in choices) > MAX_FILES:
        raise UserError(f"{text!r} names more than {MAX_FILES} files")
    endings = literals[1:]
    return [
        literals[0] + "".join(itertools.chain(*zip(chosen, endings, strict=True)))
        for chosen in itertools.product(*choices)
    ]


def _choices(inner: str, text: str) -> Sequence[str]:
    bounds = RANGE.fullmatch(inner)
    if bounds is None:
        if "," not in inner:
            raise UserError(f"{{{inner}}} in {text!r} is no range {{000..127}} and no list {{a,b}}")
        return inner.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if first > last or last - first >= MAX_FILES:
        raise UserError(f"{{{inner}}} in {text!r} must count upwards, over at most {MAX_FILES} files")
    # As in a shell, a bound that begins with 0 gives all numbers its width.
    padded = any(bound.startswith("0") and len(bound) > 1 for bound in bounds.groups())
    width = max(map(len, bounds.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
