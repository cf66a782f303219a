"""The type of a config in signatures, and what train.py and those who read its workdir agree on."""

from typing import Any, TypeAlias

Config: TypeAlias = Any
"""An `ml_collections.ConfigDict`. Its attributes are made at run time, and type checkers would miss every one."""

EXPORT = "export"
"""Folder of a workdir with the finished model, which `sdjax.load` reads."""
