"""Files of Custom Diffusion in whole pipelines against PyTorch diffusers: |difference| of images below 1e-3."""

from __future__ import annotations

import fnmatch

import numpy as np
import pytest
import torch
import zoo

import sdjax
from configs import custom_diffusion
from sdjax.checkpoints.custom_diffusion import FILES, add_custom_diffusion, write_custom_diffusion
from sdjax.checkpoints.layouts.diffusers import read_folder
from sdjax.checkpoints.networks import unet
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, size, unflatten
from sdjax.models.unet import VARIANTS
from sdjax.training.task import select

PROMPTS = ["red heart", "a painting of a dog"]
KEYS_AND_VALUES, ALL = custom_diffusion.get_config().train.trainable[0], "unet/*attn2/*"


def changed(checkpoint, pattern: str):
    """A checkpoint with other numbers where the pattern says, and the names of those."""
    rng, params = np.random.default_rng(5), flatten(checkpoint.components["unet"].params)
    names = {f"unet/{name}" for name in params if fnmatch.fnmatchcase(f"unet/{name}", f"{pattern}*")}
    for name in names:
        old = params[name.removeprefix("unet/")]
        params[name.removeprefix("unet/")] = (old + 0.3 * rng.standard_normal(old.shape)).astype(np.float32)
    part = checkpoint.components["unet"]
    return checkpoint.replace_component("unet", part.__class__(part.config, unflatten(params), part.extra)), names


@pytest.mark.parametrize("pattern", [KEYS_AND_VALUES, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_file_written_here_gives_the_same_image_in_diffusers(pattern, folders, in_diffusers, noise, tmp_path):
    """Keys and values alone, or with queries and outputs; one that diffusers wrote is the same file here."""
    base = read_folder(folders("sd1"))
    other, names = changed(base, pattern)
    write_custom_diffusion(tmp_path, other, names)
    how = {"width": zoo.SIDE, "height": zoo.SIDE, "guidance_scale": 5.0}
    ours = sdjax.load(folders("sd1"), custom_diffusion=tmp_path)(PROMPTS, steps=3, latents=noise, **how)
    theirs = in_diffusers("StableDiffusionPipeline", "sd1")
    before, latents = theirs.unet.attn_processors, torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    try:
        # Without its pipeline, diffusers 0.42 reads the file and drops it.
        theirs.unet.load_attn_procs(tmp_path, weight_name=FILES[0], _pipeline=theirs)
        images = theirs(PROMPTS, num_inference_steps=3, latents=latents, output_type="np", **how).images
        theirs.unet.save_attn_procs(tmp_path / "theirs", weight_name=FILES[1], safe_serialization=False)
    finally:
        theirs.unet.set_attn_processor(before)
    np.testing.assert_allclose(ours, images, atol=1e-3)
    plain = sdjax.load(folders("sd1"))(PROMPTS, steps=3, latents=noise, **how)
    assert np.abs(ours - plain).max() > 0.05, "the file changes nothing"
    found = add_custom_diffusion(tmp_path / "theirs")(base)
    assert {
        f"unet/{n}"
        for n, leaf in flatten(base.components["unet"].params).items()
        if not np.array_equal(leaf, flatten(found.components["unet"].params)[n])
    } == names


def test_published_totals():
    """Keys and values of SD 1's cross-attentions."""
    assert size(select({"unet": unet.shapes(VARIANTS["sd1"])}, (KEYS_AND_VALUES,))[0]) == 19_169_280


def test_other_files_and_other_weights_are_one_line(folders, tmp_path):
    base = read_folder(folders("sd1"))
    with pytest.raises(UserError, match=r"^config\.task\.export='custom_diffusion' cannot hold unet/conv_in/kernel, "):
        write_custom_diffusion(tmp_path, base, {"unet/conv_in/kernel"})
    file = folders("sd1") / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"is no file of Custom Diffusion: it has '"):
        add_custom_diffusion(file)(base)
    with pytest.raises(UserError, match=r"holds no weights of Custom Diffusion, pytorch_custom_diffusion_weights"):
        add_custom_diffusion(tmp_path)(base)
