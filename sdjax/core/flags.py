"""Command lines of scripts that take a config file: `--config FILE.py[:variant]` and `--config.section.key=value`."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from sdjax.core.errors import UserError


def parse(usage: str | None, *required: str) -> tuple[ConfigDict, ...]:
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


def parse_flags(values: flags.FlagValues, argv: list[str], usage: str | None = None) -> None:
    """Parses, and turns whatever is wrong with a flag or a config into a UserError; --help prints usage and exits."""
    if usage and ("--help" in argv[1:] or "-h" in argv[1:]):
        print(usage)
        sys.exit(0)
    try:
        left = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error
    if len(left) > 1:
        raise UserError(f"unexpected argument {left[1]!r}; flags begin with --")


def load_config(name: str) -> ConfigDict:
    """The config of `FILE.py` or `FILE.py:variant`.

    Raises:
        UserError: it cannot be read.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    parse_flags(values, [str(Path(sys.argv[0])), f"--config={name}"])
    return values["config"].value
