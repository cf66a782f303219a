"""The same images on one device and on meshes of four, which a process of its own has as virtual devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
import pytest
import zoo
from torch_reference import drawn

import sdjax
from sdjax.checkpoints.checkpoint import ALL_FORMATS, Checkpoint, Component
from sdjax.checkpoints.families import FAMILIES
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.models.embedders import ClassEmbedderConfig

SETTINGS = {"steps": 3, "sampler": "euler_a", "seed": 3, "num_images": 3, "guidance_scale": 3.0}
SETTINGS |= {"width": zoo.SIDE, "height": zoo.SIDE}
EDITED = "[red heart:blue cat:1] AND flag :0.5"
# Three images leave one of four rows to be filled up. On the second mesh rows, heads and features are split.
CODE = """
import json
import sys
import jax
import numpy as np
import sdjax
from sdjax.core.errors import UserError
from sdjax.parallel.mesh import make_mesh

text, classes, target = sys.argv[1:4]
settings, edited = json.loads(sys.argv[4]), sys.argv[5]
assert jax.device_count() == 4
for number, sizes in enumerate(({"data": 2, "fsdp": 2}, {"tensor": 2, "spatial": 2})):
    pipe = sdjax.load(text, mesh=make_mesh(sizes))
    kernel = pipe.params["unet"]["mid_block_resnets_0"]["conv1"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    np.save(f"{target}/text{number}.npy", pipe("red heart", **settings))
    np.save(f"{target}/edited{number}.npy", pipe(edited, **settings))
    if number == 0:
        pipe.save(target + "/saved")
        try:
            pipe("red heart", batch_size=6)
        except UserError as error:
            assert "batch_size=6 is not divisible by the 4 devices" in str(error)
        else:
            raise AssertionError("six images do not divide by four")
pipe = sdjax.load(classes, mesh=make_mesh({"data": 2, "fsdp": 2}))
np.save(target + "/classes.npy", pipe(class_label=1, **settings))
"""


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """A class-conditional model of LDM's."""
    sizes = {"unet": zoo.ldm_unet(32), "vae": zoo.VAES["vq_f4"], "class_embedder": ClassEmbedderConfig(3, 32)}
    components = {name: Component(size, drawn(ALL_FORMATS[name].shapes(size))) for name, size in sizes.items()}
    scheduler = FAMILIES["cin256"].scheduler
    made = Checkpoint(
        components=components, scheduler=scheduler, conditioning="class_conditional", settings={"none": 2}
    )
    folder = tmp_path_factory.mktemp("classes") / "model"
    write_checkpoint(folder, made)
    return folder


@pytest.fixture(scope="module")
def made_by_four(folder, classes, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("made")
    flags = {"XLA_FLAGS": children.devices(4), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODE, str(folder), str(classes), str(target), json.dumps(SETTINGS), EDITED]
    subprocess.run(command, check=True, env={**os.environ, **flags})
    return target


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [0, 1])
def test_four_devices_give_the_same_images(mesh, ours, made_by_four):
    expected = ours("red heart", batch_size=2, **SETTINGS)
    np.testing.assert_allclose(np.load(made_by_four / f"text{mesh}.npy"), expected, atol=1e-5)
    edited = ours(EDITED, batch_size=2, **SETTINGS)
    np.testing.assert_allclose(np.load(made_by_four / f"edited{mesh}.npy"), edited, atol=1e-5)
    assert (made_by_four / "saved" / "unet" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.slow
def test_four_devices_give_the_same_images_of_a_class(classes, made_by_four):
    expected = sdjax.load(classes)(class_label=1, batch_size=2, **SETTINGS)
    assert expected.std() > 0.05
    np.testing.assert_allclose(np.load(made_by_four / "classes.npy"), expected, atol=1e-5)
