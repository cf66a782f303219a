"""Pipelines with T2I-Adapters against PyTorch diffusers: |difference| of images below 1e-3."""

from __future__ import annotations

import functools

import diffusers
import numpy as np
import pytest
import zoo
from PIL import Image
from test_against_diffusers import NEGATIVES, PROMPTS, check, to_torch

import sdjax
from sdjax.core.errors import UserError

PIPELINES = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL"}


@pytest.fixture(scope="session")
def with_adapters(folders, adapters):
    return functools.cache(
        lambda family, *names: sdjax.load(folders(family), t2i_adapter=[adapters(name)[1] for name in names])
    )


@pytest.fixture
def theirs_with(in_diffusers, adapters):
    def pipe(family: str, *names: str):
        base = in_diffusers(f"{PIPELINES[family]}Pipeline", family)
        kind = getattr(diffusers, f"{PIPELINES[family]}AdapterPipeline")
        parts = {name: part for name, part in base.components.items() if family == "sdxl" or name != "image_encoder"}
        own = [adapters(name)[0] for name in names]
        made = kind(**parts, adapter=own if len(own) > 1 else own[0])
        made.set_progress_bar_config(disable=True)
        return made

    return pipe


@pytest.fixture
def hints():
    rng = np.random.default_rng(9)
    return [Image.fromarray(rng.integers(0, 256, (zoo.SIDE, zoo.SIDE, 3), np.uint8)) for _ in range(2)]


@pytest.mark.parametrize(
    ("family", "names", "scale", "factor"),
    [("sd1", ("full",), 0.7, 1.0), ("sd1", ("full", "grey"), [0.4, 0.8], 1.0), ("sdxl", ("xl",), 0.9, 0.5)],
    ids=["full", "two", "xl"],
)
def test_images_are_diffusers(family, names, scale, factor, theirs_with, with_adapters, hints, noise):
    """One adapter or two that add up, with guidance; XL's acts during the first half of the steps."""
    images = [hints[0], hints[1].convert("L")] if len(names) > 1 else hints[0]
    each = [[image] * len(PROMPTS) for image in images] if len(names) > 1 else [images] * len(PROMPTS)
    how = {"adapter_conditioning_factor": factor} if family == "sdxl" else {}
    expected = theirs_with(family, *names)(
        PROMPTS,
        image=each,
        negative_prompt=NEGATIVES,
        num_inference_steps=5,
        latents=to_torch(noise),
        output_type="np",
        guidance_scale=4.0,
        adapter_conditioning_scale=scale,
        **how,
    ).images
    given = {"t2i_image": images, "t2i_scale": scale, "t2i_factor": factor}
    ours = with_adapters(family, *names)
    found = ours(PROMPTS, NEGATIVES, steps=5, latents=noise, guidance_scale=4.0, **given)
    check(found, expected)
    assert np.abs(found - ours(PROMPTS, NEGATIVES, steps=5, latents=noise, guidance_scale=4.0)).max() > 0.01


def test_a_scale_compiles_nothing_and_zero_is_the_base(with_adapters, ours, hints, noise, compilations):
    """To the bit, as at a factor of 0: the images of a pipeline without adapter. Each prompt may have a hint."""
    pipe, how = with_adapters("sd1", "full"), {"steps": 5, "latents": noise, "guidance_scale": 4.0}
    pipe(PROMPTS, t2i_image=hints[0], **how)
    base = ours(PROMPTS, **how)
    compilations.clear()
    made = [pipe(PROMPTS, t2i_image=hints[1], **given, **how) for given in ({"t2i_scale": 0}, {"t2i_factor": 0.1})]
    half = pipe(PROMPTS, t2i_image=hints[1], t2i_scale=2, t2i_factor=0.5, **how)
    each = pipe(PROMPTS, t2i_image=[[hints[0]], [hints[1]]], t2i_scale=2, t2i_factor=0.5, **how)
    assert not compilations
    np.testing.assert_array_equal(each[1], half[1])
    assert np.abs(each[0] - half[0]).max() > 0.001
    for images in made:
        np.testing.assert_array_equal(images, base)
    assert np.abs(half - base).max() > 0.01


def test_grey_hints_and_sizes(with_adapters, hints):
    """A hint of one channel is the luma of its colours; it decides the size where nothing else does."""
    pipe = with_adapters("sd1", "grey")
    (row,) = pipe.prepare("", t2i_image=hints[0])
    grey = np.asarray(hints[0].convert("L"), np.float32) / 255.0
    np.testing.assert_allclose(row.parts[0].columns["t2i_image"][..., 0], grey, atol=0.51 / 255)
    assert row.size == (zoo.SIDE, zoo.SIDE)
    (row,) = pipe.prepare("", t2i_image=hints[0].resize((21, 30)))
    assert row.size == (30, 20)


def test_mistakes_are_said_in_one_line(with_adapters, ours, adapters, folders, hints):
    with pytest.raises(UserError, match="t2i_image changes nothing without a T2I-Adapter; leave it out"):
        ours.prepare("", t2i_image=hints[0])
    pipe = with_adapters("sd1", "full", "grey")
    for given, message in {
        "t2i_scale": r"t2i_scale 0.5 changes nothing without a t2i_image",
        "t2i_factor": r"t2i_factor 0.5 changes nothing without a t2i_image",
    }.items():
        with pytest.raises(UserError, match=message):
            pipe.prepare("", **{given: 0.5})
    with pytest.raises(UserError, match="1 entries in t2i_image for 2 in t2i_adapter; give one for each, in order"):
        pipe.prepare("", t2i_image=hints[0])
    with pytest.raises(UserError, match="0 entries in t2i_image for 1 in t2i_adapter; give one for each, in order"):
        with_adapters("sd1", "full").prepare("", t2i_image=[])
    with pytest.raises(UserError, match=r"t2i_scale \[0.5, 1.0\]: choose a number for each of t2i_adapter"):
        pipe.prepare("", t2i_image=hints, t2i_scale=[[0.5, 1.0], 1.0])
    with pytest.raises(UserError, match=r"20x18: sides are multiples of 4 where this T2I-Adapter acts"):
        with_adapters("sdxl", "xl").prepare("", t2i_image=hints[0], width=20, height=18)
    with pytest.raises(UserError, match=r"full' is for another UNet: it gives 64 at 1/2, 128 at 1/4, not 64 at 1/4, "):
        sdjax.load(folders("sdxl"), t2i_adapter=adapters("full")[1])
