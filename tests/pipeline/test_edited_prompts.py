"""Prompts that change from step to step, and prompts that AND composes, against PyTorch diffusers.

Images agree to 1e-4, a tenth of what a step earlier or later changes.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import zoo
from test_against_diffusers import to_torch

from sdjax.core.errors import UserError

TOLERANCE = 1e-4
SIZE, STEPS = zoo.SIDE, 6
PROMPTS, NEGATIVES = ["a [red heart:blue cat:0.5]", "[flag|smiling face]"], ["[a dog::2]", "a hat"]
SIDES = {"width": SIZE, "height": SIZE}


def texts_at(step):
    """Both prompts and negative prompts at a step, counted from 0."""
    prompts = ["a red heart" if step < STEPS // 2 else "a blue cat", ("flag", "smiling face")[step % 2]]
    return prompts, ["a dog" if step < 2 else "", "a hat"]


def check(ours, theirs):
    assert theirs.std() > 0.02, "the images show nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def swapped_by_step(pipe, encode, calls_per_step, **how):
    """diffusers' images with the embeddings of the next step put in by a callback, as its users do it."""

    def swap(pipe, call, timestep, kwargs):
        following = min((call + 1) // calls_per_step, STEPS - 1)
        return {name: value for name, value in encode(*texts_at(following)).items() if name in kwargs}

    prompts, negatives = texts_at(0)
    how |= {"prompt": prompts, "negative_prompt": negatives, "num_inference_steps": STEPS, "output_type": "np"}
    names = list(encode(prompts, negatives))
    return pipe(callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names, **how).images


@pytest.mark.parametrize(
    ("sampler", "kind", "calls"),
    [("dpmpp_2m", "DPMSolverMultistepScheduler", 1), ("heun", "HeunDiscreteScheduler", 2)],
)
def test_edited_prompts(sampler, kind, calls, in_diffusers, ours, noise):
    """Both calls of one step of Heun's are conditioned alike."""
    theirs = in_diffusers("StableDiffusionPipeline", "sd1", kind)

    def encode(prompts, negatives):
        cond, null = theirs.encode_prompt(prompts, "cpu", 1, True, negatives)
        return {"prompt_embeds": torch.cat([null, cond])}

    how = {"guidance_scale": 20.0}
    expected = swapped_by_step(theirs, encode, calls, latents=to_torch(noise), **how)
    found = ours(PROMPTS, NEGATIVES, steps=STEPS, sampler=sampler, latents=noise, **how)
    check(found, expected)
    for when in (STEPS // 2 - 1, STEPS // 2 + 1):
        others = [f"a [red heart:blue cat:{when}]", "[smiling face|flag]"]
        wrong = ours(others, NEGATIVES, steps=STEPS, sampler=sampler, latents=noise, **how)
        assert np.abs(wrong - found).max(axis=(1, 2, 3)).min() > 10 * TOLERANCE


@pytest.mark.slow
def test_sdxl_edits_the_pooled_prompt_too(in_diffusers, opened, noise):
    theirs = in_diffusers("StableDiffusionXLPipeline", "sdxl", "EulerDiscreteScheduler")

    def encode(prompts, negatives):
        cond, null, pooled, null_pooled = theirs.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negatives
        )
        return {"prompt_embeds": torch.cat([null, cond]), "add_text_embeds": torch.cat([null_pooled, pooled])}

    how = {"guidance_scale": 9.0, "original_size": (40, 30), "target_size": (16, 24)}
    expected = swapped_by_step(theirs, encode, 1, latents=to_torch(noise), **SIDES, **how)
    check(opened("sdxl")(PROMPTS, NEGATIVES, steps=STEPS, sampler="euler", latents=noise, **how), expected)


COMPOSED = [
    [("a red heart", 1.0), ("a blue cat", 0.7)],
    [("flag", -0.3), ("smiling face", 1.1)],
]


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_composed_prompts(scale, in_diffusers, ours, noise):
    """Composable diffusion (Liu et al. 2022, eq. 11), in a loop over diffusers' own UNet and scheduler."""
    theirs = in_diffusers("StableDiffusionPipeline", "sd1", "DDIMScheduler")
    theirs.scheduler.set_timesteps(STEPS)
    columns = [theirs.encode_prompt([row[i][0] for row in COMPOSED], "cpu", 1, False)[0] for i in range(2)]
    weights = [torch.tensor([row[i][1] for row in COMPOSED]).reshape(-1, 1, 1, 1) for i in range(2)]
    null = theirs.encode_prompt(NEGATIVES[1:] * 2, "cpu", 1, False)[0]
    x = to_torch(noise)
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            away, *toward = (theirs.unet(x, t, each).sample for each in (null, *columns))
            moves = sum(weight * scale * (one - away) for weight, one in zip(weights, toward, strict=True))
            x = theirs.scheduler.step(away + moves, t, x).prev_sample
        expected = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    prompts = ["a red heart AND a blue cat :0.7", "flag: -.3 AND smiling face :1.1"]
    found = ours(prompts, NEGATIVES[1], steps=STEPS, sampler="ddim", latents=noise, guidance_scale=scale)
    check(found, expected)


def test_other_words_times_and_steps_compile_nothing(ours, compilations):
    """A schedule has as many texts as the next power of two; all within are arguments."""
    how = {"guidance_scale": 3.0, "batch_size": 2, "sampler": "euler_a"}
    images = [ours(PROMPTS, NEGATIVES, steps=STEPS, **how)]
    ours(["a", "b"], steps=STEPS, **how)
    compilations.clear()
    images.append(ours(["[a:b:1]", "[x|y]"], steps=9, **how))
    images.append(ours("[a:b:.9]", "[c::3]", steps=4, seed=3, num_images=2, **how))
    images.append(ours(["a", "b"], "[c|d]", steps=9, **how))
    images.append(ours(["[a:b:20]", "[[c:d:0]]"], steps=9, **how))  # which never change
    np.testing.assert_array_equal(images[-1], ours(["a", "[d]"], steps=9, **how))
    assert not compilations
    assert len({image.tobytes() for image in images}) == len(images)


def test_edited_and_plain_prompts_do_not_mix(ours):
    """Each batch runs its own program; an image is what its prompt alone gives."""
    prompts = ["red heart", PROMPTS[0], "flag", PROMPTS[1]]
    how = {"steps": 4, "guidance_scale": 3.0, "batch_size": 2}
    together = ours(prompts, **how)
    for i in (0, 1):
        np.testing.assert_allclose(together[i], ours(prompts[i], first_index=i, **how)[0], atol=1e-5)


def conditions(row, part=0):
    """The first prompt's place at each call of a table."""
    made = row.parts[part]
    return made.schedule.places[made.table.active, 0].tolist()


def test_which_step_is_which(ours):
    """Of image to image the first step taken is the first; the second pass counts on from the first."""
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    (row,) = ours.prepare("[red heart:flag:2]", init_image=picture, strength=0.5, steps=10)
    assert conditions(row) == [0, 0, 2, 2, 2]
    assert row.settings["prompt"] == "[red heart:flag:2]"
    (row,) = ours.prepare("[red heart:flag:3]", sampler="heun", steps=5)
    assert conditions(row) == [0] * 6 + [2] * 3
    (row,) = ours.prepare("[red heart:flag:2]", sampler="plms", steps=4)
    assert conditions(row) == [0, 0, 0, 2, 2]
    hires = {"hires": 2, "hires_strength": 0.6, "steps": 10}
    first = ours.prepare("red heart", **hires)[0].parts[0].columns["ids"]
    for when in ("1.25", "12"):
        (row,) = ours.prepare(f"[red heart:flag:{when}]", **hires)
        assert row.parts[0].schedule is None
        np.testing.assert_array_equal(row.parts[0].columns["ids"], first)
        assert conditions(row.second) == [0, 0, 2, 2, 2, 2]
    for when in ("1.25", "12"):
        (row,) = ours.prepare(f"[red heart:flag:{when}]", **hires, hires_steps=8)
        assert conditions(row.second) == [0, 0, 2, 2, 2, 2, 2, 2], "of 13 steps the last 8, which are counted"


def test_plain_syntax_edits_nothing(ours):
    (row,) = ours.prepare("[red heart:flag:2] AND hat", syntax="plain")
    assert row.parts[0].schedule is None


def test_and_is_a_word_of_negative_prompts(ours, caplog):
    with caplog.at_level(logging.WARNING, "sdjax"):
        (row,) = ours.prepare("red heart", "flag AND hat")
    assert row.parts[0].schedule is None
    assert "'AND' is not understood in the prompt 'flag AND hat': negative prompts are not composed" in caplog.text


def test_rejects_too_many_texts(ours):
    with pytest.raises(UserError, match=r"AND composes 17 prompts in 'a AND a.*; at most 16"):
        ours.prepare(" AND ".join("a" * 17))
    many = "".join(f"[{i}:{i + 1}:{i}]" for i in range(1, 80))
    with pytest.raises(UserError, match=r"the prompt '\[1:2:1\].* has 80 texts; at most 64"):
        ours.prepare(many, steps=90)
