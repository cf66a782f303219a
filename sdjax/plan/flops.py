"""Floating-point operations of a traced program: of all devices together, with every turn of every loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from sdjax.ops.attention import compiling_for


def count(function: Callable[..., Any], *args: Any) -> int:
    """Operations of all matrix products and convolutions of a function, two a multiplication; nothing else is counted.

    Of branches it is the one with most work that counts.

    Args:
        *args: arrays, or `jax.ShapeDtypeStruct`s.
    """
    with compiling_for("cpu"):  # where attention is written as products, and in no kernel that hides them
        return _in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _in_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * depth * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * (kernel.size // features)
    if name == "cond":
        return max(_in_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
    repeats = equation.params["length"] if name == "scan" else 1
    return repeats * sum(_in_jaxpr(inner) for value in equation.params.values() for inner in _jaxprs(value))


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _jaxprs(inner)
