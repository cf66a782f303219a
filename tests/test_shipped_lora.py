"""The LoRA in the repository, which recolours what the shipped model draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import sdjax
from sdjax.data.sources.open import open_rows

ROOT = Path(__file__).parents[1]
BASE, LORA = ROOT / "checkpoints/openmoji", ROOT / "checkpoints/openmoji_recolour"
CALL = {"steps": 10, "guidance_scale": 2.5}
ORDER = [2, 0, 1]  # red from blue, green from red, blue from green


def hue(image: np.ndarray) -> np.ndarray:
    """Mean of red, green and blue, without their grey."""
    pixels = image.reshape(-1, 3)
    return (pixels - pixels.mean(1, keepdims=True)).mean(0)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-6))


def test_it_is_below_a_megabyte():
    assert sum(path.stat().st_size for path in LORA.iterdir()) < 1_000_000


@pytest.mark.slow
def test_samples_have_the_new_colours_as_strongly_as_asked():
    """Of 12 held-out drawings that have a hue. At strength 0 images are the base's to the bit."""
    held_out = open_rows("openmoji_recoloured:rgb", "held_out")
    colourful = (row for row in map(held_out.__getitem__, range(0, 192, 2)) if np.linalg.norm(hue(row["image"])) > 20.4)
    rows = list(colourful)[::2][:12]
    prompts, found = [row["caption"] for row in rows], {}
    pipe = sdjax.load(BASE, lora=[str(LORA)])
    for strength in (0.0, 0.5, 1.0):
        images = pipe(prompts, lora_scale=[strength], seed=0, **CALL)
        pairs = [(hue(image), row["image"]) for image, row in zip(images, rows, strict=True)]
        found[strength] = np.mean([cosine(own, hue(drawing[..., ORDER])) for own, drawing in pairs])
        drawn = np.mean([cosine(own, hue(drawing)) for own, drawing in pairs])
        print(f"strength {strength}: cosine {found[strength]:.3f} with the new colours, {drawn:.3f} with the old ones")
        if not strength:
            np.testing.assert_array_equal(images, sdjax.load(BASE)(prompts, seed=0, **CALL))
    assert found[0.0] < 0.0 < 0.4 < found[1.0]
    assert found[0.0] < found[0.5] < found[1.0]


@pytest.mark.slow
def test_diffusers_makes_the_same_images():
    """From the same latents; images in [0, 1] agree to 1e-3."""
    torch.set_num_threads(1)
    theirs = StableDiffusionPipeline.from_pretrained(BASE)
    theirs.load_lora_weights(LORA, weight_name="pytorch_lora_weights.safetensors")
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 16)).astype(np.float32)
    noise = torch.from_numpy(latents.transpose(0, 3, 1, 2))
    call = {"num_inference_steps": 10, "guidance_scale": 2.5, "latents": noise, "output_type": "np"}
    expected = theirs("red heart", **call).images
    found = sdjax.load(BASE, lora=[str(LORA)])("red heart", latents=latents, **CALL)
    print("difference", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
