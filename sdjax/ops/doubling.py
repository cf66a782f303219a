"""Nearest-neighbour doubling and a 3x3 convolution, without making the doubled image.

Of three rows under the kernel two are the same, so each of the four pixels that a pixel becomes is a convolution with
2x2 sums of the kernel's rows and columns: four products in place of nine. All four are one convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.ops.convolution import Edges, over_rows


def convolve_doubled(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"], *_: Any, **__: Any
) -> Float[Array, "b 2*h 2*w f"]:
    """The doubled image's convolution with a row or column of zeros around it.

    For `nn.Conv(..., (3, 3), padding=1, conv_general_dilated=convolve_doubled)`, whose further arguments are these.
    """
    c, features = kernel.shape[2:]
    rows = _doubled(kernel)  # [i r 3 c f]: what output row i sees of input row r
    both = _doubled(jnp.moveaxis(rows, 2, 0))  # [j s i r c f]
    both = jnp.transpose(both, (3, 1, 4, 2, 0, 5)).reshape(2, 2, c, 4 * features).astype(x.dtype)
    return over_rows(_doubled_rows, x, both, (1, 1))


def _doubled_rows(x: Float[Array, "b r w c"], kernel: Float[Array, "2 2 c 4*f"], edges: Edges) -> Array:
    """The doubled image of rows that are seen with one more above and below, in x or still to be added."""
    out = _quarters(x, kernel, edges)
    b, h, w = out.shape[0], out.shape[1] - 1, out.shape[2] - 1
    out = out.reshape(b, h + 1, w + 1, 2, 2, -1)
    pixels = jnp.stack([jnp.stack([out[:, i : i + h, j : j + w, i, j] for j in (0, 1)], 3) for i in (0, 1)], 2)
    return pixels.reshape(b, 2 * h, 2 * w, -1)


def _convolved(x: Float[Array, "b r w c"], kernel: Float[Array, "2 2 c 4*f"], edges: Edges) -> Array:
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (edges, (1, 1)), dimension_numbers=names)


# Its gradient of the kernel is four products of matrices: XLA's own, a convolution under a window with an odd number of
# rows and columns, takes ten times as long on a CPU.
_quarters = jax.custom_vjp(_convolved, nondiff_argnums=(2,))


def _quarters_forward(x: Array, kernel: Array, edges: Edges) -> tuple[Array, tuple[Array, Array]]:
    return _convolved(x, kernel, edges), (x, kernel)


def _quarters_backward(edges: Edges, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (of_x,) = jax.linear_transpose(lambda x: _convolved(x, kernel, edges), x)(gradient)
    _, rows, columns, _ = gradient.shape
    x = jnp.pad(x, ((0, 0), edges, (1, 1), (0, 0)))
    product = partial(jnp.einsum, "bhwc,bhwf->cf", preferred_element_type=jnp.float32)
    of_kernel = [[product(x[:, i : i + rows, j : j + columns], gradient) for j in (0, 1)] for i in (0, 1)]
    return of_x, jnp.array(of_kernel).astype(kernel.dtype)


_quarters.defvjp(_quarters_forward, _quarters_backward)


def _doubled(taps: Float[Array, "3 ..."]) -> Float[Array, "2 2 ..."]:
    """For the first and the second of two output pixels, the weights of the two input pixels that they see."""
    first, middle, last = taps.astype(jnp.float32)
    return jnp.stack([jnp.stack([first, middle + last]), jnp.stack([first + middle, last])])
