"""Conversion as data: tables pair our parameter names with stored keys.

In the patterns of a table `*` stands for an integer, e.g. ("down_blocks_*_resnets_*/conv1/kernel",
"down_blocks.*.resnets.*.conv1.weight", CONV). Patterns are matched against the model's actual parameters,
so any missing or unexpected key, on either side, is reported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sdjax.core.errors import UserError
from sdjax.core.tree import Tree, flatten, unflatten

SHOWN = 20
BLOCK, MAX_BLOCKS = 4, 1000  # tensors that any block of layers has; SDXL's UNet has 87 blocks


class Kind(NamedTuple):
    """Storage of a leaf: `inward` converts a stored array to our layout, `outward` inverts it; both return views."""

    inward: Callable[[np.ndarray], np.ndarray]
    outward: Callable[[np.ndarray], np.ndarray]


SAME = Kind(lambda x: x, lambda x: x)
LINEAR = Kind(lambda w: w.T, lambda w: w.T)  # (out, in) to (in, out)
CONV = Kind(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW to HWIO
POINTWISE = Kind(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # a 1x1 convolution to a Dense


class KeyMapping(NamedTuple):
    """One pattern of parameter names, the pattern of stored keys, and how the array is stored."""

    ours: str
    theirs: str
    kind: Kind


class KeyTable(NamedTuple):
    """A bijection between parameter names and stored keys.

    Attributes:
        aliases: (regular expression, replacement) pairs: other spellings of stored keys that are read, never written.
        ignored: regular expressions of stored keys that hold no parameter.
        copies: keys that may hold what another key holds, and that key; they are read where it is missing.
    """

    rows: tuple[KeyMapping, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = {}


class Stored(Protocol):
    """An array or a promise of one: `np.asarray` reads it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __array__(self) -> np.ndarray: ...


class Writable(Stored, Protocol):
    """An array or a promise of one, whose type is known."""

    @property
    def dtype(self) -> np.dtype: ...


Shapes = Mapping[str, tuple[int, ...]]
Modules = dict[str, str]
Put = Callable[[np.ndarray, str], Any]


def at(ours: str, theirs: str, rows: Iterable[KeyMapping]) -> tuple[KeyMapping, ...]:
    """The rows of a module, moved below a prefix on each side."""
    return tuple(KeyMapping(f"{ours}/{row.ours}", f"{theirs}.{row.theirs}", row.kind) for row in rows)


def layer(ours: str, theirs: str | None = None, kind: Kind = LINEAR) -> tuple[KeyMapping, ...]:
    """Kernel and, where there is one, bias of a linear layer or a convolution."""
    return KeyMapping(f"{ours}/kernel", f"{theirs or ours}.weight", kind), KeyMapping(
        f"{ours}/bias", f"{theirs or ours}.bias", SAME
    )


def conv(ours: str, theirs: str | None = None) -> tuple[KeyMapping, ...]:
    """Kernel and bias of a convolution."""
    return layer(ours, theirs, CONV)


def norm(ours: str, theirs: str | None = None) -> tuple[KeyMapping, ...]:
    """Scale and bias of a normalisation."""
    return KeyMapping(f"{ours}/scale", f"{theirs or ours}.weight", SAME), KeyMapping(
        f"{ours}/bias", f"{theirs or ours}.bias", SAME
    )


def embedding(ours: str, theirs: str) -> tuple[KeyMapping, ...]:
    """A table of embeddings, one row a token."""
    return (KeyMapping(f"{ours}/embedding", f"{theirs}.weight", SAME),)


class KeyPlace(NamedTuple):
    """The place of a stored parameter."""

    key: str
    kind: Kind


def places(table: KeyTable, names: Iterable[str]) -> dict[str, KeyPlace]:
    """The place of every parameter, in the order of `names`.

    Raises:
        UserError: no row speaks of a name, or two names share a key.
    """
    patterns = [(re.compile(re.escape(row.ours).replace(r"\*", r"(\d+)")), row) for row in table.rows]
    matched: dict[str, KeyPlace] = {}
    unmatched, keys, twice = [], set(), set()
    for name in names:
        found = next(((m, row) for pattern, row in patterns if (m := pattern.fullmatch(name))), None)
        if found is None:
            unmatched.append(name)
            continue
        match, row = found
        matched[name] = KeyPlace(row.theirs.replace("*", "{}").format(*match.groups()), row.kind)
        (twice if matched[name].key in keys else keys).add(matched[name].key)
    if unmatched:
        raise UserError(f"no rule of conversion for {len(unmatched)} parameters: {listed(unmatched)}")
    if twice:
        raise UserError(f"several parameters would be stored under one key: {listed(sorted(twice))}")
    return matched


def stored_shapes(table: KeyTable, shapes: Tree) -> dict[str, tuple[int, ...]]:
    """The keys that a checkpoint of parameters of these shapes has, and the shape of each."""
    flat = flatten(shapes)
    empty = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in flat.items()}
    return {place.key: place.kind.outward(empty[name]).shape for name, place in places(table, flat).items()}


def read(
    table: KeyTable,
    tensors: Mapping[str, Stored],
    shapes: Tree,
    dtype: DTypeLike | None,
    source: object,
    sharded_put: Put | None = None,
) -> dict[str, Any]:
    """Parameters as a nested dictionary of NumPy arrays of type `dtype`; nothing is read before all keys fit.

    Tensors are read, converted and passed to `sharded_put` one at a time, so peak memory is the tree built so far and
    at most two copies of a single tensor.

    Args:
        tensors: what is stored, by key.
        shapes: the model's own parameters: a tree of arrays or `jax.ShapeDtypeStruct`s.
        dtype: None leaves each as it is stored.
        source: the file or folder, for messages.
        sharded_put: makes a leaf of an array and its name, e.g. puts it onto devices; None leaves arrays.

    Raises:
        UserError: a key is missing, unexpected or there twice, a shape differs, or a value is not finite in `dtype`.
    """
    tensors = _canonical(table, tensors, source)
    check_shapes(stored_shapes(table, shapes), {key: tuple(t.shape) for key, t in tensors.items()}, source)
    leaves: dict[str, Any] = {}
    for name, place in places(table, flatten(shapes)).items():
        array = finite(place.kind.inward(np.asarray(tensors[place.key])), dtype, f"{place.key} in {source}")
        leaves[name] = array if sharded_put is None else sharded_put(array, name)
    return unflatten(leaves)


def export(table: KeyTable, params: Tree, shapes: Tree, source: object) -> dict[str, np.ndarray]:
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


def _canonical(table: KeyTable, tensors: Mapping[str, Stored], source: object) -> dict[str, Stored]:
    """The tensors under the keys that the table writes, without those that it ignores."""
    renamed: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        name = table.copies.get(key, key)
        if any(re.fullmatch(pattern, key) for pattern in table.ignored) or (name != key and name in tensors):
            continue
        for pattern, replacement in table.aliases:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise UserError(f"{source} holds {name} twice, under an older and a newer name")
        renamed[name] = tensor
    return renamed


def check_shapes(wanted: Shapes, found: Shapes, source: object, *, strict: bool = True) -> list[str]:
    """Compare shapes by key, and return the keys that are not wanted.

    Args:
        strict: whether there must be none of those.

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
    if any(keys for what, keys in differences.items() if strict or what != "unexpected"):
        lines = [f"\n  {len(keys)} {what}: {listed(keys)}" for what, keys in differences.items() if keys]
        raise UserError(f"{source} does not fit the model of its config:{''.join(lines)}")
    return differences["unexpected"]


def listed(names: list[str]) -> str:
    """At most 20 names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_blocks(blocks: int, tensors: Collection[str], source: object) -> None:
    """Hold a network's sizes to its weights before it is traced, which takes time for each block.

    Raises:
        UserError: there are too few tensors for so many blocks, or more blocks than any network has.
    """
    if blocks > min(len(tensors) // BLOCK, MAX_BLOCKS):
        raise UserError(
            f"{source} does not fit the model of its config, which has {blocks} blocks of layers: the weights are "
            f"{len(tensors)} tensors; at most {MAX_BLOCKS} blocks are read"
        )


def traced(init: Callable[..., Any], *inputs: Any) -> dict[str, Any]:
    """The parameters of a module's `init`, as a tree of `jax.ShapeDtypeStruct`; equal blocks are traced once.

    The inputs may be such, too: an untrusted config says how large they are.
    """

    def params(key: jax.Array, *inputs: Any) -> Any:
        with nn.intercept_methods(_once_each()):
            return init(key, *inputs)["params"]

    return jax.eval_shape(params, jax.random.key(0), *inputs)


def _once_each() -> Callable[..., Any]:
    """An interceptor that gives a module the parameters and outputs of an equal one that had inputs of equal shapes.

    Their values are wrong and their shapes right. A network repeats its blocks, and of SDXL's seconds in Flax and JAX
    seven eighths are repetition.
    """
    seen: dict[Any, tuple[Any, dict[str, Any]]] = {}

    def call(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        fields = {field.name for field in dataclasses.fields(module)} - {"name", "parent"}
        leaves, tree = jax.tree.flatten((args, kwargs))
        shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
        sizes = tuple((name, getattr(module, name)) for name in sorted(fields))
        key = (type(module), context.method_name, sizes, tree, shapes)
        if key in seen:
            outputs, params = seen[key]
            for name, value in params.items():
                module.put_variable("params", name, value)
            return outputs
        outputs = method(*args, **kwargs)
        seen[key] = outputs, dict(module.variables.get("params", {}))
        return outputs

    return call


def below(theirs: str, ours: str, names: Mapping[str, str]) -> Modules:
    """The names of a module's parts, below a prefix on each side."""
    return {f"{theirs}.{new}": f"{ours}.{old}" for new, old in names.items()}


def renamed(key: str, modules: Modules) -> str:
    """The key with its longest known beginning replaced.

    Raises:
        UserError: none is known.
    """
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (module := ".".join(parts[:end])) in modules:
            return ".".join((modules[module], *parts[end:]))
    raise UserError(f"{key} has no name in the original layout")
