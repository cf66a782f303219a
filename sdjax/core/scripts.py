"""Scripts that a config file describes: `--config FILE.py[:variant]` and `--config.section.key=value`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.flags import parse_flags

Define = Callable[[flags.FlagValues], None]
"""Adds flags to a script's own."""


def command_line(usage: str | None, *define: Define) -> flags.FlagValues:
    """Reads the command line of a script whose flags are a config and those that `define` adds.

    Raises:
        UserError: --config is missing, a flag is unknown, the config file cannot be read, or it has no such key.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    for add in define:
        add(values)
    parse_flags(values, sys.argv, usage)
    require(values, "config")
    return values


def require(values: flags.FlagValues, name: str) -> Any:
    """The value of a flag.

    Raises:
        UserError: it was not given.
    """
    if values[name].value is None:
        raise UserError(f"--{name} is required")
    return values[name].value


def load_config(name: str) -> Config:
    """The config of `FILE.py` or `FILE.py:variant`, whatever this process's own command line changes in another one.

    Raises:
        UserError: it cannot be read.
    """
    values, argv = flags.FlagValues(), [str(Path(sys.argv[0])), f"--config={name}"]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    parse_flags(values, argv)
    return values["config"].value
