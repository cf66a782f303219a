"""Floating-point operations of a traced program, and what devices can do at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from sdjax.models.attention import compiling_for

# Dense bfloat16 with float32 sums, in TFLOP/s, by the beginning of JAX's device_kind; longer names first.
# NVIDIA: the data sheets of H200, H100, A100, L40S, L4, and the architecture papers "NVIDIA Ada GPU" and "NVIDIA RTX
# Blackwell GPU". TPU: cloud.google.com/tpu/docs, "System architecture" of each version, a chip; a device of v2 and v3
# is half a chip.
PEAKS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.4,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}


def peak(device_kind: str) -> float | None:
    """The device's published bfloat16 peak in FLOP/s; None where the table has none."""
    return next((1e12 * value for name, value in PEAKS.items() if device_kind.startswith(name)), None)


def count(function: Callable[..., Any], *args: Any) -> int:
    """Operations of all matrix products and convolutions of a function, two a multiplication; the rest is not counted.

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
