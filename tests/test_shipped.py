"""The models in the repository: PyTorch diffusers loads them and makes the same images, transformers the CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor

import sdjax
from configs import clip as clip_config
from sdjax.checkpoints.clip_pair import read_clip
from sdjax.data.sources.open import source
from sdjax.data.sources.openmoji_parts import lines
from sdjax.eval.caption_retrieval import evaluate_clip
from sdjax.eval.clip_score import caption_embeddings, image_embeddings
from sdjax.eval.edges import edge_agreement

FOLDER = Path(__file__).parents[1] / "checkpoints" / "openmoji"
LINEART = FOLDER.with_name("openmoji_lineart")
CLIP = FOLDER.with_name("openmoji_clip")
PROMPTS = ["red heart", "woman firefighter: medium skin tone"]


def test_diffusers_makes_the_same_images():
    """By the scheduler that the folder names, from the same latents; images in [0, 1] agree to 1e-3."""
    torch.set_num_threads(1)
    theirs = StableDiffusionPipeline.from_pretrained(FOLDER)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    expected = theirs(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=2.5,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    found = sdjax.load(FOLDER)(PROMPTS, steps=10, guidance_scale=2.5, latents=latents)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_it_is_at_most_40_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40_000_000


def test_diffusers_makes_the_same_images_of_a_line_drawing():
    """With the ControlNet of line drawings, whose hint is what the card's command makes of black lines."""
    torch.set_num_threads(1)
    net = ControlNetModel.from_pretrained(LINEART)
    theirs = StableDiffusionControlNetPipeline.from_pretrained(FOLDER, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    drawing = 255 - lines("1F408")
    hint = torch.from_numpy(lines("1F408").transpose(2, 0, 1)[None] / np.float32(255.0))
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 16)).astype(np.float32)
    how = {"num_inference_steps": 10, "guidance_scale": 2.5, "output_type": "np"}
    expected = theirs("", image=hint, latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)), **how).images
    pipe = sdjax.load(FOLDER, controlnet=[LINEART])
    options = {"control_image": drawing, "control_from": "invert", "steps": 10, "guidance_scale": 2.5}
    found = pipe("", latents=latents, **options)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    f1 = edge_agreement(found[0], lines("1F408") / np.float32(255.0)).f1
    without = edge_agreement(pipe("", latents=latents, control_scale=0.0, **options)[0], lines("1F408") / 255.0).f1
    assert f1 > 0.7
    assert f1 > without + 0.25


def test_the_lineart_controlnet_is_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in LINEART.rglob("*") if path.is_file()) <= 16_000_000


def test_transformers_gives_the_clip_the_same_cosines():
    """Of held-out images and captions in their own sizes and words, to 1e-4."""
    torch.set_num_threads(1)
    held_out = source("openmoji", "held_out")
    rows = [held_out[i] for i in range(0, len(held_out), 21)]
    captions = [row["caption"] for row in rows]
    theirs, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    inputs = processor(text=captions, images=[row["image"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**inputs)
    expected = (output.image_embeds @ output.text_embeds.T).numpy()
    pair = read_clip(CLIP)
    found = image_embeddings(pair, rows, 10) @ caption_embeddings(pair, captions, 10).T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(pair.logit_scale), theirs.logit_scale.exp().item(), rtol=1e-3)


def test_the_clip_knows_held_out_captions():
    """As its card says: most images find their own caption among 210, and nearly all among the first five."""
    figures = evaluate_clip(clip_config.get_config(), str(CLIP))
    assert figures["pairs"] == 210
    assert figures["top1_image_to_caption"] > 0.8
    assert figures["top5_image_to_caption"] > 0.95
    assert figures["matched_above_shuffled"] > 0.99
    assert figures["clip_score"] > figures["clip_score_shuffled"] + 50


def test_the_clip_is_at_most_15_megabytes():
    assert sum(path.stat().st_size for path in CLIP.rglob("*") if path.is_file()) <= 15_000_000
