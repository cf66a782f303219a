"""Sizes of networks read from a config.json, and written to one: every key is understood or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.core.errors import UserError

MAX_SIZE = 2**20  # more than any network has of channels, tokens, classes
MAX_NUMBER = 1e30
MAX_SIDE = 2**12  # of the images that a network is made for
MAX_LEVELS = 10
MAX_STEPS = 10_000  # of sampling
MAX_TOKENS = 2**12  # of a text
SHOWN = 200


class Field(NamedTuple):
    """A size: its name here, its key in a config.json, what a missing key means, and the most that it can be.

    The default's type is the value's: True or False; a positive number; a positive integer; text, which `check` has
    looked at; None for a positive integer or null.
    """

    ours: str
    theirs: str
    default: Any
    most: int = MAX_SIZE


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
        if type(value) not in (int, float) or not 1 / MAX_NUMBER <= value <= MAX_NUMBER:
            raise unsupported(config, field.theirs, place, "a positive number, as float32 has them")
        return float(value)
    elif not isinstance(default, str) and not (default is None and value is None):
        return integer(config, field.theirs, default or 0, place, field.most)
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


def check_sample_size(config: Mapping[str, Any], place: str) -> None:
    """Holds the size that a network's images have, where its config says one, to a size that can be made.

    Raises:
        UserError: it is none.
    """
    said = config.get("sample_size")
    sides = said if isinstance(said, list) and len(said) == 2 else [said]
    if said is not None and not all(_is_size(side, MAX_SIDE) for side in sides):
        raise unsupported(config, "sample_size", place, f"one or two positive integers, at most {MAX_SIDE}")


def check_settings(settings: Mapping[str, Any], place: str) -> None:
    """Holds what a folder says of sampling it, and of its condition, to values that can be.

    Raises:
        UserError: naming the key, its value and what it must be.
    """
    for key, (fits, wanted) in SETTINGS.items():
        if key in settings and not fits(settings[key]):
            raise unsupported(settings, key, place, wanted)


def check_levels(channels: Sequence[int], place: str) -> None:
    """Refuses more levels than any network has: each doubles the sides of the image that its sizes are made for.

    Raises:
        UserError: there are more than MAX_LEVELS, or one has a single channel: a timestep is a sine and a cosine.
    """
    if min(channels) < 2:
        raise UserError(f"{place} has a network of {list(channels)} channels; each level has 2 at least")
    if len(channels) > MAX_LEVELS:
        raise UserError(f"{place} has a network of {len(channels)} levels; at most {MAX_LEVELS} are read")


def check_groups(groups: int, channels: Sequence[int], place: str) -> None:
    """Holds norm_num_groups to a divisor of every level's channels.

    Raises:
        UserError: it is none.
    """
    check_levels(channels, place)
    if any(level % groups for level in channels):
        key = "norm_num_groups"
        raise unsupported({key: groups}, key, place, f"a divisor of each of {list(channels)}")


def unsupported(config: Mapping[str, Any], key: str, place: str, wanted: str) -> UserError:
    """The error for a key whose value is not what is wanted."""
    said = repr(config.get(key))
    short = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
    return UserError(f"{key} = {short} in {place} is not supported; it must be {wanted}")


def integer(config: Mapping[str, Any], key: str, default: int, place: str, most: int = MAX_SIZE) -> int:
    """A positive integer up to `most`."""
    value = config.get(key, default)
    if not _is_size(value, most):
        raise unsupported(config, key, place, f"a positive integer, at most {most}")
    return value


def _is_size(value: Any, most: int = MAX_SIZE) -> bool:
    return type(value) is int and 0 < value <= most


def _are(kind: type) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(type(value) is kind for value in values)


SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "classes": (_are(str), "a list of names"),
    "guidance_scale": (lambda value: type(value) in (int, float) and 0 <= value < MAX_SIZE, "a number of at least 0"),
    "none": (lambda value: value in (None, 0) or _is_size(value), "the number of a class"),
    "nothing": (lambda value: _are(int)(value) and all(0 <= token < MAX_SIZE for token in value), "a list of tokens"),
    "object_classes": (_is_size, f"a positive integer, at most {MAX_SIZE}"),
    "sampler": (lambda value: isinstance(value, str), "a name"),
    "schedule": (lambda value: isinstance(value, str), "a name"),
    "size": (lambda value: _is_size(value, MAX_SIDE), f"a positive integer, at most {MAX_SIDE}"),
    "steps": (lambda value: _is_size(value, MAX_STEPS), f"a positive integer, at most {MAX_STEPS}"),
    "text_length": (lambda value: _is_size(value, MAX_TOKENS), f"a positive integer, at most {MAX_TOKENS}"),
}
"""Of a checkpoint that this library wrote, in its model_index.json."""


def integers(config: Mapping[str, Any], key: str, default: int | tuple[int, ...], levels: int, place: str) -> tuple:
    """One positive integer a level; a single one is meant for all levels. `levels` 0 takes up to MAX_LEVELS of them."""
    value = config.get(key, default)
    values = [value] * levels if type(value) is int else value
    fits = isinstance(values, list | tuple) and len(values) in ((levels,) if levels else range(1, MAX_LEVELS + 1))
    if not fits or not all(map(_is_size, values)):
        wanted = (
            f"a positive integer or {levels} of them" if levels else f"a list of 1 to {MAX_LEVELS} positive integers"
        )
        raise unsupported(config, key, place, f"{wanted}, at most {MAX_SIZE}")
    return tuple(values)


def attention_levels(
    config: Mapping[str, Any], sides: Sequence[tuple[str, Mapping[bool, str], list[str]]], levels: int, place: str
) -> tuple[bool, ...]:
    """Tell which levels have attention, the finest first; the way up must mirror the way down.

    Args:
        sides: of the way down, then of the way up, where there is one: the key, the block's name without and with
            attention, and what a missing key means.

    Raises:
        UserError: a block is unknown, there are not `levels` of them, or the sides differ.
    """
    found: list[list[bool]] = []
    for key, names, default in sides:
        blocks, known = config.get(key, default), {name: here for here, name in names.items()}
        named = isinstance(blocks, list | tuple) and all(isinstance(block, str) for block in blocks)
        if not named or len(blocks) != levels or any(block not in known for block in blocks):
            raise unsupported(config, key, place, f"{levels} of {' and '.join(known)}")
        found.append([known[block] for block in blocks])
    if any(up != found[0][::-1] for up in found[1:]):
        raise unsupported(config, sides[1][0], place, f"the reverse of {sides[0][0]}")
    return tuple(found[0])
