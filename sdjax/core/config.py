"""The type of a config in signatures."""

from typing import Any, TypeAlias

Config: TypeAlias = Any
"""An `ml_collections.ConfigDict`. Its attributes are made at run time, and type checkers would miss every one."""
