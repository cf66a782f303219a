"""The same pictures on one device and on a mesh of four; in a process of its own, where XLA is told to have four."""

from __future__ import annotations

import os
import subprocess
import sys

import children
import numpy as np
from sdjax.tasks.latent.networks import sizes_of
from torch_reference import drawn

from sdjax.convert.components import ALL_FORMATS, Checkpoint, Component
from sdjax.convert.folder import write_checkpoint
from sdjax.convert.ldm_families import LDM_FAMILIES
from sdjax.models.autoencoder import VARIANTS
from sdjax.models.embedders import ClassEmbedderConfig
from sdjax.models.unet import UNetConfig

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
    flags = {"XLA_FLAGS": children.devices(4), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", CODE, str(theirs.folder), str(tmp_path)], check=True, env={**os.environ, **flags}
    )
    expected = ours(
        ["red heart", "flag"], steps=3, sampler="euler_a", seed=3, num_images=3, guidance_scale=3.0, batch_size=2
    )
    for name in ("images", "images0", "images1"):  # the last two split rows, heads and features
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-5)
    assert (tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors").exists()


CONDITIONAL = """
import sys
import jax
import numpy as np
import sdjax
from sdjax.parallel.mesh import make_mesh

source, target = sys.argv[1:]
mesh = None if jax.device_count() == 1 else make_mesh({"data": 2, "fsdp": 2})
pipe = sdjax.load_conditional(source, mesh=mesh)
kernel = pipe.params["unet"]["mid_block_resnets_0"]["conv1"]["kernel"]
assert mesh is None or not kernel.sharding.is_fully_replicated
for count in (3, 4):
    images = pipe(class_label=1, steps=3, seed=3, num_images=count, guidance_scale=3.0, width=16, height=16)
    np.save(f"{target}/{jax.device_count()}_{count}.npy", images)
"""


def test_four_devices_make_the_same_pictures_of_a_class(tmp_path):
    unet = UNetConfig((32, 64), (0, 1), 1, (2, 2), 32, in_channels=3, out_channels=3, layers_per_block=1)
    small = {"channels": (8, 8, 16), "layers_per_block": 1, "groups": 4, "codes": 64}
    sizes = {"unet": unet, "vae": sizes_of({"variant": "vq_f4", **small}, VARIANTS, "")}
    sizes |= {"class_embedder": ClassEmbedderConfig(3, 32)}
    components = {name: Component(size, drawn(ALL_FORMATS[name].shapes(size))) for name, size in sizes.items()}
    scheduler = LDM_FAMILIES["cin256"].scheduler
    checkpoint = Checkpoint(
        components=components, scheduler=scheduler, conditioning="class_conditional", settings={"none": 2}
    )
    write_checkpoint(tmp_path / "model", checkpoint)
    for devices in (1, 4):
        flags = {"XLA_FLAGS": children.devices(devices), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", CONDITIONAL, str(tmp_path / "model"), str(tmp_path)]
        subprocess.run(command, check=True, env={**os.environ, **flags})
    for count in (3, 4):
        one, four = (np.load(tmp_path / f"{devices}_{count}.npy") for devices in (1, 4))
        assert one.std() > 0.05
        np.testing.assert_allclose(four, one, atol=1e-5)
