"""Winograd's products beside PyTorch's convolution, and where they stand in a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.ops import winograd
from sdjax.ops.convolution import convolve
from sdjax.plan import flops

SAME = winograd.SYMMETRIC
NUMBERS = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 256, 288), np.float32) / np.sqrt(9 * 256)
    return rng.standard_normal((2, 16, 18, 256), np.float32), np.asarray(kernel, np.float32)


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=NUMBERS)


def ours(x, kernel):
    return convolve(x, kernel, (1, 1), SAME, dimension_numbers=NUMBERS)


def test_products_are_the_convolution(arrays):
    """Beside PyTorch in float64: outputs of size 1, to 2e-5."""
    x, kernel = (torch.from_numpy(array).double() for array in arrays)
    wanted = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), padding=1)
    np.testing.assert_allclose(jax.jit(ours)(*arrays), wanted.permute(0, 2, 3, 1), atol=2e-5)


def test_winograd_only_on_cpu(arrays):
    traced = jax.jit(ours).trace(*arrays)
    here, there = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu"))
    assert (here.count("stablehlo.dot_general"), here.count("stablehlo.convolution")) == (16, 0)
    assert (there.count("stablehlo.dot_general"), there.count("stablehlo.convolution")) == (0, 1)


def test_what_the_mathematics_asks_for_is_counted(arrays):
    assert flops.count(ours, *arrays) == flops.count(plain, *arrays) == 2 * 9 * 256 * 288 * 2 * 16 * 18


def test_gradients_are_those_of_the_convolution(arrays):
    def gradients(convolve):
        return jax.jit(jax.grad(lambda x, kernel: jnp.tanh(convolve(x, kernel)).sum(), (0, 1)))

    for found, wanted in zip(gradients(ours)(*arrays), gradients(plain)(*arrays), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dtype", "options"),
    [
        ((1, 16, 16, 256), (3, 3, 256, 255), 1, SAME, "float32", {}),
        ((1, 16, 16, 256), (3, 3, 256, 256), 2, SAME, "float32", {}),
        ((1, 16, 16, 256), (3, 3, 256, 256), 1, ((0, 1), (0, 1)), "float32", {}),
        ((1, 16, 16, 256), (5, 5, 256, 256), 1, SAME, "float32", {}),
        ((1, 16, 17, 256), (3, 3, 256, 256), 1, SAME, "float32", {}),
        ((1, 8, 16, 256), (3, 3, 256, 256), 1, SAME, "float32", {}),
        ((1, 16, 16, 256), (3, 3, 256, 256), 1, SAME, "bfloat16", {}),
        ((1, 512, 512, 256), (3, 3, 256, 256), 1, SAME, "float32", {}),
        ((1, 16, 16, 512), (3, 3, 256, 256), 1, SAME, "float32", {"feature_group_count": 2}),
        ((1, 16, 16, 256), (3, 3, 256, 256), 1, SAME, "float32", {"rhs_dilation": (1, 2)}),
    ],
)
def test_what_is_small_or_of_another_kind_is_left_to_xla(shape, kernel, stride, padding, dtype, options):
    def apply(x, kernel):
        return convolve(x, kernel, (stride, stride), padding, dimension_numbers=NUMBERS, **options)

    specimens = [jax.ShapeDtypeStruct(size, dtype) for size in (shape, kernel)]
    text = jax.jit(apply).trace(*specimens).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" in text
    assert "dot_general" not in text


def test_several_devices_convolve(arrays):
    """Their parts are the compiler's to choose, or the exchange's of edge rows."""

    def primitives(devices: int) -> set[str]:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("data",))):
            return {equation.primitive.name for equation in jax.make_jaxpr(ours)(*arrays).eqns}

    assert primitives(1) == {"custom_vjp_call"}
    assert primitives(2) == {"conv_general_dilated"}
