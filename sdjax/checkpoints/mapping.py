"""Conversion as data: tables pair our parameter names with stored keys, and our sizes with those of a config.json.

In the patterns of a table `*` stands for an integer, e.g. ("down_blocks_*_resnets_*/conv1/kernel",
"down_blocks.*.resnets.*.conv1.weight", CONV). The model's own shapes say which of the patterns' names exist, so nothing
can be left over on either side unseen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sdjax.core.errors import UserError
from sdjax.core.tree import Tree, flatten, unflatten

SHOWN = 20


class Kind(NamedTuple):
    """The storage of a leaf: `inward` makes a stored array ours, `outward` is its inverse. Both are views."""

    inward: Callable[[np.ndarray], np.ndarray]
    outward: Callable[[np.ndarray], np.ndarray]


SAME = Kind(lambda x: x, lambda x: x)
LINEAR = Kind(lambda w: w.T, lambda w: w.T)  # (out, in) to (in, out)
CONV = Kind(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW to HWIO
POINTWISE = Kind(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # a 1x1 convolution to a Dense


class Row(NamedTuple):
    """One pattern of parameter names, the pattern of stored keys, and how the array is stored."""

    ours: str
    theirs: str
    kind: Kind


class Table(NamedTuple):
    """A bijection between parameter names and stored keys.

    Attributes:
        aliases: (regular expression, replacement) pairs: other spellings of stored keys that are read, never written.
        ignored: regular expressions of stored keys that hold no parameter.
    """

    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


class Stored(Protocol):
    """An array or a promise of one: `np.asarray` reads it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __array__(self) -> np.ndarray: ...


Shapes = Mapping[str, tuple[int, ...]]
Placer = Callable[[np.ndarray, str], Any]


def at(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a module, moved below a prefix on each side."""
    return tuple(Row(f"{ours}/{row.ours}", f"{theirs}.{row.theirs}", row.kind) for row in rows)


def layer(ours: str, theirs: str | None = None, kind: Kind = LINEAR) -> tuple[Row, ...]:
    """Kernel and, where there is one, bias of a linear layer or a convolution."""
    return Row(f"{ours}/kernel", f"{theirs or ours}.weight", kind), Row(f"{ours}/bias", f"{theirs or ours}.bias", SAME)


def conv(ours: str, theirs: str | None = None) -> tuple[Row, ...]:
    """Kernel and bias of a convolution."""
    return layer(ours, theirs, CONV)


def norm(ours: str, theirs: str | None = None) -> tuple[Row, ...]:
    """Scale and bias of a normalisation."""
    return Row(f"{ours}/scale", f"{theirs or ours}.weight", SAME), Row(f"{ours}/bias", f"{theirs or ours}.bias", SAME)


def embedding(ours: str, theirs: str) -> tuple[Row, ...]:
    """A table of embeddings, one row a token."""
    return (Row(f"{ours}/embedding", f"{theirs}.weight", SAME),)


class Place(NamedTuple):
    """The place of a stored parameter."""

    key: str
    kind: Kind


def places(table: Table, names: Iterable[str]) -> dict[str, Place]:
    """The place of every parameter, in the order of `names`.

    Raises:
        UserError: no row speaks of a name, or two names share a key.
    """
    patterns = [(re.compile(re.escape(row.ours).replace(r"\*", r"(\d+)")), row) for row in table.rows]
    matched: dict[str, Place] = {}
    unmatched, keys, twice = [], set(), set()
    for name in names:
        found = next(((m, row) for pattern, row in patterns if (m := pattern.fullmatch(name))), None)
        if found is None:
            unmatched.append(name)
            continue
        match, row = found
        matched[name] = Place(row.theirs.replace("*", "{}").format(*match.groups()), row.kind)
        (twice if matched[name].key in keys else keys).add(matched[name].key)
    if unmatched:
        raise UserError(f"no rule of conversion for {len(unmatched)} parameters: {listed(unmatched)}")
    if twice:
        raise UserError(f"several parameters would be stored under one key: {listed(sorted(twice))}")
    return matched


def stored_shapes(table: Table, shapes: Tree) -> dict[str, tuple[int, ...]]:
    """The keys that a checkpoint of parameters of these shapes has, and the shape of each."""
    flat = flatten(shapes)
    empty = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in flat.items()}
    return {place.key: place.kind.outward(empty[name]).shape for name, place in places(table, flat).items()}


def read(
    table: Table,
    tensors: Mapping[str, Stored],
    shapes: Tree,
    dtype: DTypeLike | None,
    source: object,
    placer: Placer | None = None,
) -> dict[str, Any]:
    """Parameters as a nested dictionary of NumPy arrays of type `dtype`; nothing is read before all keys fit.

    One tensor is read, converted and handed to `placer` before the next, so at no time are more than two copies of one
    of them in memory beside the tree that grows.

    Args:
        tensors: what is stored, by key.
        shapes: the model's own parameters: a tree of arrays or `jax.ShapeDtypeStruct`s.
        dtype: None leaves each as it is stored.
        source: the file or folder, for messages.
        placer: makes the leaf of the tree from an array and its name, e.g. puts it onto devices; None leaves arrays.

    Raises:
        UserError: a key is missing, unexpected or there twice, a shape differs, or a value is not finite in `dtype`.
    """
    tensors = _canonical(table, tensors, source)
    check_shapes(stored_shapes(table, shapes), {key: tuple(t.shape) for key, t in tensors.items()}, source)
    leaves: dict[str, Any] = {}
    for name, place in places(table, flatten(shapes)).items():
        array = finite(place.kind.inward(np.asarray(tensors[place.key])), dtype, f"{place.key} in {source}")
        leaves[name] = array if placer is None else placer(array, name)
    return unflatten(leaves)


def export(table: Table, params: Tree, shapes: Tree, source: object) -> dict[str, np.ndarray]:
    """The inverse of `read`: NumPy views of the parameters by stored key.

    Raises:
        UserError: the parameters are not those of the model that has `shapes`.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    wanted = {name: leaf.shape for name, leaf in flatten(shapes).items()}
    check_shapes(wanted, {name: array.shape for name, array in flat.items()}, source)
    return {place.key: place.kind.outward(flat[name]) for name, place in places(table, flat).items()}


def finite(array: np.ndarray, dtype: DTypeLike | None, what: str) -> np.ndarray:
    """A copy of `array` in `dtype`, or in its own type where that is None.

    Raises:
        UserError: it holds NaN or infinite values there, e.g. because float16 ends at 65504.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        copy = np.array(array, dtype=dtype, order="C")
    if jnp.issubdtype(copy.dtype, jnp.floating) and not np.isfinite(copy).all():
        raise UserError(f"{what} holds values that are not finite in {copy.dtype}")
    return copy


def _canonical(table: Table, tensors: Mapping[str, Stored], source: object) -> dict[str, Stored]:
    """The tensors under the keys that the table writes, without those that it ignores."""
    renamed: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in table.ignored):
            continue
        name = key
        for pattern, replacement in table.aliases:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise UserError(f"{source} holds {name} twice, under an older and a newer name")
        renamed[name] = tensor
    return renamed


def check_shapes(wanted: Shapes, found: Shapes, source: object) -> None:
    """Compares shapes by key.

    Raises:
        UserError: with the keys that are missing, unexpected or of another shape.
    """
    times = {"wanted": wanted, "found": found}
    both = [key for key in wanted if key in found and wanted[key] != found[key]]
    said = {key: {side: "x".join(map(str, of[key])) or "scalar" for side, of in times.items()} for key in both}
    differences = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [f"{key} ({shapes['found']}, not {shapes['wanted']})" for key, shapes in said.items()],
    }
    if any(differences.values()):
        lines = [f"\n  {len(keys)} {what}: {listed(keys)}" for what, keys in differences.items() if keys]
        raise UserError(f"{source} does not fit the model of its config:{''.join(lines)}")


def listed(names: list[str]) -> str:
    """At most 20 names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def traced(init: Callable[..., Any], *inputs: Any) -> dict[str, Any]:
    """The parameters that a module's `init` makes, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(init, jax.random.key(0), *inputs)["params"]


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
