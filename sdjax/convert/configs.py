"""Checks on the config.json of a checkpoint: what it asks for must be what the models here are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.core.errors import UserError


def check(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], place: str) -> None:
    """Refuses a value that stands for another structure; the first of the allowed values is what a missing key means.

    Raises:
        UserError: naming the key, its value and the choices.
    """
    for key, choices in allowed.items():
        if config.get(key, choices[0]) not in choices:
            raise unsupported(config, key, place, " or ".join(repr(choice) for choice in choices))


def groups(config: Mapping[str, Any], channels: Sequence[int], place: str) -> int:
    """norm_num_groups, a divisor of every level's channels.

    Raises:
        UserError: it is none.
    """
    count = integer(config, "norm_num_groups", 32, place)
    if any(level % count for level in channels):
        raise unsupported(
            {"norm_num_groups": count}, "norm_num_groups", place, f"a divisor of each of {list(channels)}"
        )
    return count


def unsupported(config: Mapping[str, Any], key: str, place: str, wanted: str) -> UserError:
    """The error for a key whose value is not what is wanted."""
    return UserError(f"{key} = {config.get(key)!r} in {place} is not supported; it must be {wanted}")


def integer(config: Mapping[str, Any], key: str, default: int, place: str) -> int:
    """A positive integer."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise unsupported(config, key, place, "a positive integer")
    return value


def integers(config: Mapping[str, Any], key: str, default: int | tuple[int, ...], levels: int, place: str) -> tuple:
    """One positive integer a level; a single one is meant for all levels. `levels` 0 takes any number of them."""
    value = config.get(key, default)
    values = [value] * levels if type(value) is int else value
    counted = isinstance(values, list | tuple) and len(values) == (levels or len(values)) and len(values) > 0
    if not counted or any(type(n) is not int or n < 1 for n in values):
        wanted = f"a positive integer or {levels} of them" if levels else "a list of positive integers"
        raise unsupported(config, key, place, wanted)
    return tuple(values)
