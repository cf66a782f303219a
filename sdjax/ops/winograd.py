"""Winograd's F(2x2, 3x3) for a CPU: four outputs of a 3x3 convolution from 16 products in place of 36.

Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.1. The tiles of an output hold two
rows and two columns, their inputs four of each; between the transforms stand 16 matrix products over the channels. The
larger tiles of F(4x4, 3x3) would save more and cost a digit of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SYMMETRIC = ((1, 1), (1, 1))
LEAST_CHANNELS, LEAST_SIDE = 256, 16
"""Below, the transforms take longer than the products that they save."""
MOST_VALUES = 2**24
"""Of the input: the products together take four times its memory."""


def suits(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "r s c f"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> bool:
    """True for a convolution of the kind that `convolve` knows, and large enough to be faster there."""
    return (
        kernel.shape[:3] == (3, 3, x.shape[3])
        and tuple(strides) == (1, 1)
        and tuple(padding) == SYMMETRIC
        and x.dtype == kernel.dtype == jnp.float32
        and not (x.shape[1] % 2 or x.shape[2] % 2)
        and min(x.shape[1:3]) >= LEAST_SIDE
        and min(kernel.shape[2:]) >= LEAST_CHANNELS
        and x.size <= MOST_VALUES
    )


@jax.custom_vjp
def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h w f"]:
    """A 3x3 convolution of images with even sides and a row or column of zeros around them.

    By 16 products where the program is compiled for a CPU and is not differentiated; else by XLA's convolution.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_by_products, default=_plainly)


def _plainly(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), SYMMETRIC, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plainly(x, kernel), (x, kernel)


def _backward(primals: tuple[Array, Array], gradient: Array) -> tuple[Array, ...]:
    return jax.vjp(_plainly, *primals)[1](gradient)


convolve.defvjp(_forward, _backward)


def _by_products(x: Array, kernel: Array) -> Array:
    batch, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _input([padded[:, i : i + height : 2] for i in range(4)])
    tiles = [_input([row[:, :, j : j + width : 2] for j in range(4)]) for row in rows]
    by_rows = [_kernel([kernel[r, s] for r in range(3)]) for s in range(3)]
    kernels = [_kernel([by_rows[s][i] for s in range(3)]) for i in range(4)]
    products = [[tiles[i][j] @ kernels[i][j] for j in range(4)] for i in range(4)]
    columns = [_output([products[i][j] for i in range(4)]) for j in range(4)]
    outputs = [jnp.stack(_output([column[a] for column in columns]), 3) for a in range(2)]
    return jnp.stack(outputs, 2).reshape(batch, height, width, -1)


def _input(d: Sequence[Array]) -> tuple[Array, ...]:
    """B^T d, along one axis."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _kernel(g: Sequence[Array]) -> tuple[Array, ...]:
    """G g, along one axis."""
    return g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]


def _output(m: Sequence[Array]) -> tuple[Array, ...]:
    """A^T m, along one axis."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
