"""The same pictures on one device and on a mesh of four; in a process of its own, where XLA is told to have four."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

CODE = """
import sys
import jax
import numpy as np
import sdjax
from sdjax.parallel.mesh import make_mesh

source, target = sys.argv[1:]
assert jax.device_count() == 4
settings = {"steps": 3, "sampler": "euler_a", "seed": 3, "num_images": 3, "guidance_scale": 3.0}
pipe = sdjax.load(source, mesh=make_mesh({"data": 2, "fsdp": 2}))
images = pipe(["red heart", "flag"], **settings)
kernel = pipe.params["unet"]["mid_block_resnets_0"]["conv1"]["kernel"]
assert not kernel.sharding.is_fully_replicated
try:
    pipe("red heart", batch_size=6)
except sdjax.core.errors.UserError as error:
    assert "batch_size=6 is not divisible by the 4 devices" in str(error)
pipe.save(target + "/saved")
np.save(target + "/images.npy", images)
for number, sizes in enumerate(({"spatial": 4}, {"tensor": 2, "spatial": 2})):
    again = sdjax.load(source, mesh=make_mesh(sizes))
    np.save(f"{target}/images{number}.npy", again(["red heart", "flag"], **settings))
"""


def test_four_devices_give_the_same_pictures(theirs, ours, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", CODE, str(theirs.folder), str(tmp_path)], check=True, env={**os.environ, **flags}
    )
    expected = ours(
        ["red heart", "flag"], steps=3, sampler="euler_a", seed=3, num_images=3, guidance_scale=3.0, batch_size=2
    )
    for name in ("images", "images0", "images1"):  # the last two split rows, heads and features
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-5)
    assert (tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors").exists()
