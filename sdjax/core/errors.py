"""Errors of users, in one line: the value, the place, the choices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable


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


def run_or_exit(main: Callable[[], None]) -> None:
    """Runs a script's main; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
