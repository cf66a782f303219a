"""Convolutions of split rows beside whole ones: in a process of its own, which has eight devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import pytest

CODE = """
import json
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from sdjax.ops.convolution import convolve
from sdjax.ops.partition import TENSOR, constrain_image
from sdjax.models.layers import Conv
from sdjax.ops.doubling import convolve_doubled
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh

def conv(size, stride, padding):
    def apply(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return convolve(x, kernel[:size, :size], (stride, stride), padding, dimension_numbers=numbers)
    return apply

def double(x, kernel):
    return Conv(8, convolve=convolve_doubled).apply({"params": {"kernel": kernel[:3, :3], "bias": kernel[0, 0, 0]}}, x)

one, none = ((1, 1), (1, 1)), ((0, 0), (0, 0))
same, halve, autoencoder = conv(3, 1, one), conv(3, 2, one), conv(3, 2, "SAME")
cases = {
    "3x3": (16, same),
    "1x1": (16, conv(1, 1, none)),
    "halved": (16, halve),
    "halved as in autoencoders": (16, autoencoder),
    "4x4 halved": (16, conv(4, 2, one)),
    "4x4 without the last row": (16, conv(4, 1, one)),
    "doubled": (8, double),
    "rows that do not divide": (6, same),
    "an odd number of rows each": (24, halve),
    "down and up": (16, lambda x, k: double(halve(double(autoencoder(same(x, k), k), k), k), k)),
}
rng = np.random.default_rng(0)
kernel = 0.2 * rng.standard_normal((4, 4, 8, 8), np.float32)

def value_and_gradients(name):
    rows, apply = cases[name]
    x = np.random.default_rng(rows).standard_normal((8, rows, 4, 8), np.float32)
    weights = np.random.default_rng(1).standard_normal((8, 2 * rows, 8, 8), np.float32)

    @jax.jit
    def run(x, kernel):
        def loss(x, kernel):
            y = constrain_image(apply(constrain_image(x), kernel), TENSOR)
            return (jnp.tanh(y) * weights[:, :y.shape[1], :y.shape[2]]).sum()
        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(run(x, kernel))]

whole = {name: value_and_gradients(name) for name in cases}
errors = {}
for mesh in sys.argv[1:]:
    with jax.set_mesh(make_mesh(parse_mesh(mesh))):
        for name in cases:
            pairs = zip(value_and_gradients(name), whole[name], strict=True)
            errors[f"{mesh} {name}"] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
print(json.dumps(errors))
"""
MESHES = ["spatial=8", "data=4,spatial=2", "tensor=4,spatial=2", "fsdp=2,tensor=2,spatial=2"]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    flags = {"XLA_FLAGS": children.devices(8), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CODE, *MESHES]
    found = subprocess.run(command, check=True, env=os.environ | flags, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_of_a_convolution_may_be_split(errors, mesh):
    """Value and both gradients, to 5e-5 of the largest; XLA's own splitting was wrong by up to a factor of four."""
    found = {name: error for name, error in errors.items() if name.startswith(mesh)}
    assert len(found) == 10
    assert {name: error for name, error in found.items() if error > 5e-5} == {}
