"""Sizes of networks read from a config.json, and written to one: every key is understood or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.core.errors import UserError


class Field(NamedTuple):
    """A size: its name here, its key in a config.json, and what a missing key means.

    The default's type is the value's: True or False; a positive number; a positive integer; text, which `check` has
    looked at; None for a positive integer or null.
    """

    ours: str
    theirs: str
    default: Any


def read_fields(config: Mapping[str, Any], fields: Iterable[Field], place: str) -> dict[str, Any]:
    """Sizes by our names.

    Raises:
        UserError: a value is of another type.
    """
    return {field.ours: _value(config, field, place) for field in fields}


def _value(config: Mapping[str, Any], field: Field, place: str) -> Any:
    value, default = config.get(field.theirs, field.default), field.default
    if isinstance(default, bool):
        if type(value) is not bool:
            raise unsupported(config, field.theirs, place, "true or false")
    elif isinstance(default, float):
        if type(value) not in (int, float) or value <= 0:
            raise unsupported(config, field.theirs, place, "a positive number")
        return float(value)
    elif not isinstance(default, str) and not (default is None and value is None):
        return integer(config, field.theirs, default or 0, place)
    return value


def write_fields(sizes: Any, fields: Iterable[Field]) -> dict[str, Any]:
    """The inverse of `read_fields`, of a config's attributes."""
    return {field.theirs: getattr(sizes, field.ours) for field in fields}


def check(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], place: str) -> None:
    """Refuses a value that stands for another structure; the first of the allowed values is what a missing key means.

    Raises:
        UserError: naming the key, its value and the choices.
    """
    for key, choices in allowed.items():
        if config.get(key, choices[0]) not in choices:
            raise unsupported(config, key, place, " or ".join(repr(choice) for choice in choices))


def check_groups(groups: int, channels: Sequence[int], place: str) -> None:
    """Holds norm_num_groups to a divisor of every level's channels.

    Raises:
        UserError: it is none.
    """
    if any(level % groups for level in channels):
        key = "norm_num_groups"
        raise unsupported({key: groups}, key, place, f"a divisor of each of {list(channels)}")


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


def attention_levels(
    config: Mapping[str, Any], sides: Sequence[tuple[str, Mapping[bool, str], list[str]]], levels: int, place: str
) -> tuple[bool, ...]:
    """Tell which levels have attention, the finest first; the way up must mirror the way down.

    Args:
        sides: of the way down, then of the way up: the key, the block's name without and with attention, and what a
            missing key means.

    Raises:
        UserError: a block is unknown, there are not `levels` of them, or the sides differ.
    """
    found: list[list[bool]] = []
    for key, names, default in sides:
        blocks, known = config.get(key, default), {name: here for here, name in names.items()}
        if not isinstance(blocks, list | tuple) or len(blocks) != levels or any(b not in known for b in blocks):
            raise unsupported(config, key, place, f"{levels} of {' and '.join(known)}")
        found.append([known[block] for block in blocks])
    if found[0] != found[1][::-1]:
        raise unsupported(config, sides[1][0], place, f"the reverse of {sides[0][0]}")
    return tuple(found[0])
