"""Flags of scripts, and what is wrong with a command line as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from sdjax.core.errors import UserError

TIMEOUTS = {"coordinator_timeout": 300, "heartbeat_timeout": 100}
PROCESSES = ("coordinator", "processes", "process_id", *TIMEOUTS)


def define_processes(values: flags.FlagValues) -> None:
    """The flags of a script that several processes run together; `processes` reads them."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 listens", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is, from 0", flag_values=values)
    for name, default in TIMEOUTS.items():
        flags.DEFINE_integer(name, default, "seconds", lower_bound=1, flag_values=values)


def processes(values: flags.FlagValues) -> dict[str, Any]:
    """Values of the flags of `define_processes`, as `sdjax.parallel.distributed.initialise` takes them."""
    return {name: values[name].value for name in PROCESSES}


def parse_flags(
    values: flags.FlagValues,
    argv: list[str],
    usage: str | None = None,
    arguments: Sequence[str] = (),
    *,
    more: bool = False,
) -> list[str]:
    """Parses, and turns whatever is wrong with a flag or a config into a UserError; --help prints usage and exits.

    Returns:
        The values of the named `arguments`, which stand without dashes anywhere on the command line; with `more`,
        others may stand among them.
    """
    values.set_gnu_getopt(True)
    if usage and ("--help" in argv[1:] or "-h" in argv[1:]):
        print(usage)
        sys.exit(0)
    try:
        left = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(_reason(error)) from error
    given = left[1:]
    if len(given) > len(arguments) and not more:
        raise UserError(f"unexpected argument {given[len(arguments)]!r}; flags begin with --")
    if len(given) < len(arguments):
        raise UserError(f"{arguments[len(given)]} is missing; what is wanted: {' '.join(arguments)}")
    if "config" in values:
        _check_config(values["config"])
    return given


def _reason(error: Exception) -> str:
    """One line; of an error that holds a config file's whole traceback, what that ends with."""
    text = str(error).strip()
    if "Traceback" in text:
        return f"--config: {text.splitlines()[-1].strip().removeprefix('ValueError: ')}"
    return " ".join(text.split()) or type(error).__name__


def _check_config(flag: flags.Flag) -> None:
    """A config file that could not be run says so when it is first read; this reads it."""
    try:
        assert flag.value is None or flag.value.keys() is not None
    except OSError as error:
        *_, reason = str(error).strip().splitlines()
        name = getattr(flag, "config_filename", "")
        raise UserError(f"cannot read the config file {name}: {reason.strip()}") from error
