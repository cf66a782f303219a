"""Rows of RESULTS.md, and what every row says of how it was measured."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measuring
from sdjax.core.errors import UserError
from sdjax.core.files import write_text
from sdjax.plan.chips import chip_of

RESULTS = Path(__file__).with_name("RESULTS.md")


def facts(script: str, packages: tuple[str, ...], devices: Sequence[Any]) -> dict[str, str]:
    """When, where and what was measured, by a script of this folder."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": measuring.commit(),
        "device": measuring.device_name(devices),
        "versions": measuring.versions(packages),
        "command": f"`python -m benchmarks.{script} {shlex.join(sys.argv[1:])}`",
    }


def utilisation(speed: float, dtype: str, devices: Sequence[Any]) -> str:
    """Floating-point operations a second of all devices together; their share of the published peak."""
    peak = chip_of(devices[0].device_kind).flops
    if peak is None or dtype != "bfloat16":
        return f"{speed / 1e12:.3g}"
    return f"{speed / 1e12:.3g} ({speed / (peak * len(devices)):.1%})"


def show(figures: Mapping[str, str]) -> None:
    """Prints one row, a line for each column."""
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))


def append(figures: Mapping[str, str], path: Path) -> None:
    """Adds a row to the end of the file's table that has these columns.

    Raises:
        UserError: the file has no such table.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    header = f"| {' | '.join(figures)} |"
    if header not in lines:
        raise UserError(f"{path} has no table with the columns {', '.join(figures)}")
    end = lines.index(header)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    row = " | ".join(value.replace("|", "\\|") for value in figures.values())
    write_text(path, "\n".join([*lines[:end], f"| {row} |", *lines[end:]]) + "\n")
