"""Command lines of scripts that take a config file: `--config FILE.py[:variant]` and `--config.section.key=value`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sdjax.core.config import Config
from sdjax.core.errors import UserError


def parse(usage: str | None, *required: str) -> tuple[Config, ...]:
    """Reads the command line of a script whose flags are a config and some required strings.

    Args:
        usage: what --help says.
        *required: names of string flags.

    Returns:
        The config, then the strings.

    Raises:
        UserError: a flag is missing or unknown, the config file cannot be read, or it has no such key.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    for name in required:
        flags.DEFINE_string(name, None, "required", flag_values=values)
    parse_flags(values, sys.argv, usage)
    missing = [name for name in ("config", *required) if values[name].value is None]
    if missing:
        raise UserError(f"--{missing[0]} is required")
    return (values["config"].value, *(values[name].value for name in required))


def parse_flags(
    values: flags.FlagValues, argv: list[str], usage: str | None = None, arguments: Sequence[str] = ()
) -> list[str]:
    """Parses, and turns whatever is wrong with a flag or a config into a UserError; --help prints usage and exits.

    Returns:
        The values of the named `arguments`, which stand without dashes anywhere on the command line.
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
    if len(given) > len(arguments):
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


def load_config(name: str) -> Config:
    """The config of `FILE.py` or `FILE.py:variant`.

    Raises:
        UserError: it cannot be read.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    parse_flags(values, [str(Path(sys.argv[0])), f"--config={name}"])
    return values["config"].value
