"""Errors of users, in one line: the value, the place, the choices."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable

LONGEST = 2000  # letters of a line


class UserError(Exception):
    """A mistake that the user can mend. Scripts print it as one line and exit with code 2."""


def unknown(kind: str, value: object, choices: Iterable[str], place: str = "") -> UserError:
    """An error for a name that is not among the choices.

    Args:
        kind: what was being chosen, e.g. "sampler".
        value: what the user wrote.
        choices: every name that would have been understood.
        place: the flag, file or config key that held the value.
    """
    where = f" in {place}" if place else ""
    return UserError(f"unknown {kind} {value!r}{where}; choose one of: {', '.join(sorted(choices))}")


def printable(text: object) -> str:
    """Text as it is shown: control characters and half surrogate pairs as escapes, of long lines the beginning.

    Files and names that others made can put anything into a message, also what commands a terminal.
    """
    return "\n".join(map(_printable, str(text).split("\n")))


def _printable(line: str) -> str:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LONGEST])
    return shown if len(line) <= LONGEST else f"{shown}..."


def run_or_exit(main: Callable[[], None]) -> None:
    """Runs a script's main; a UserError becomes one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # to print a name that is not UTF-8 is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
