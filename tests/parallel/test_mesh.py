"""Any mesh trains the same network; fsdp makes each device hold less; a wrong mesh is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError
from sdjax.parallel.mesh import make_mesh, nearest_shapes, shapes_of
from sdjax.parallel.sharding import check_batch, spec_of

SCRIPT = Path(__file__).with_name("on_four_devices.py")


def run(devices: int) -> list[dict]:
    flags = {"XLA_FLAGS": children.devices(devices)}
    paths = {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run([sys.executable, SCRIPT], env=os.environ | flags | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_mesh_trains_the_same():
    """Three losses on 1 device and on 4 (data 4; data 2 x fsdp 2; fsdp 4) agree to 1e-5."""
    one, four = run(1), run(4)
    for alone, together in zip(one, four, strict=True):
        np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-5)
    assert one[0]["losses"][2] < one[0]["losses"][0]
    whole, halves, quarters = (four[i]["bytes"] for i in (0, 2, 4))
    assert whole == one[0]["bytes"]
    assert halves == pytest.approx(whole / 2, rel=1e-3)
    assert quarters == pytest.approx(whole / 4, rel=1e-3)


def test_fsdp_splits_the_largest_dimension_that_can_be():
    eight = {"fsdp": 8}
    assert spec_of("conv", (3, 3, 320, 640), eight) == P(None, None, None, "fsdp")
    assert spec_of("embedding", (768, 77), eight) == P("fsdp", None)
    assert spec_of("conv", (3, 3, 3, 1001), eight) == P()
    assert spec_of("bias", (640,), eight) == P(), "small arrays stay whole"


def test_nearest_meshes():
    assert len(set(shapes_of(8))) == len(shapes_of(8)) == 20
    assert nearest_shapes({"fsdp": 4, "tensor": 4}, 8, 2) == [(1, 4, 2, 1), (1, 2, 4, 1)]
    assert nearest_shapes({"data": -1, "spatial": 3}, 8, 1) == [(2, 1, 1, 4)], "an axis that may be anything is"


def test_wrong_meshes_are_one_line():
    with pytest.raises(UserError, match=r"unknown mesh axis 'model' in config.mesh; choose one of: data, fsdp"):
        make_mesh({"model": 2})
    with pytest.raises(UserError, match=rf"data=3 does not cover the {jax.device_count()} devices .*; nearest: data=1"):
        make_mesh({"data": 3})
    mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), ("data", "fsdp", "tensor", "spatial"))
    with pytest.raises(UserError, match=r"batch=12 is not divisible by the 8 devices of data x fsdp; nearest: 8, 16"):
        check_batch(12, mesh, "batch")  # pyright: ignore[reportArgumentType]
