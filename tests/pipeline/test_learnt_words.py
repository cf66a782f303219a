"""Words of textual inversions in whole pipelines against PyTorch diffusers: |difference| of images below 1e-3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from safetensors.numpy import save_file

import sdjax
from sdjax.checkpoints.embeddings import read_embeddings, write_embeddings
from sdjax.data.text.textual_inversion import Embedding

WORD, PROMPTS = "<hat>", ["a painting of <hat>", "red <hat>, heart"]
KINDS = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
HOW = {"guidance_scale": 5.0}
STEPS = 3


def test_a_file_beside_is_the_second_encoders_if_its_word_is_the_same(tmp_path):
    """Else it is a word of its own, whatever its name."""
    first, second = (np.full((1, width), width, np.float32) for width in (4, 6))
    save_file({"<cat>": first}, tmp_path / "cat.safetensors")
    save_file({"<cat>": second}, tmp_path / "cat_2.safetensors")
    for source in (tmp_path, tmp_path / "cat.safetensors"):
        assert [[v.shape[1] for v in word.vectors] for word in read_embeddings(source)] == [[4, 6]]
    save_file({"<cat2>": second}, tmp_path / "cat_2.safetensors")
    assert [word.word for word in read_embeddings(tmp_path)] == ["<cat>", "<cat2>"]
    (word,) = read_embeddings(tmp_path / "cat.safetensors")
    assert [v.shape[1] for v in word.vectors] == [4]


@pytest.mark.parametrize("family", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_files_written_here_give_the_same_image_in_diffusers(family, folders, in_diffusers, noise, tmp_path):
    """Of two vectors, from the folder of a run; with its file for web UIs the same to the bit, under its own name."""
    rng, encoders = np.random.default_rng(0), 2 if family == "sdxl" else 1
    vectors = tuple(rng.standard_normal((2, 64)).astype(np.float32) for _ in range(encoders))
    write_embeddings(tmp_path, [Embedding(WORD, vectors)])
    size = {"width": zoo.SIDE, "height": zoo.SIDE}
    how = {"steps": STEPS, "latents": noise, **size, **HOW}
    ours = sdjax.load(folders(family), embeddings=[tmp_path])(PROMPTS, **how)
    theirs = in_diffusers(KINDS[family], family)
    before = [e.config.eos_token_id for e in (theirs.text_encoder, getattr(theirs, "text_encoder_2", None)) if e]
    assert before[0] != 2, "transformers would look for the end of the prompt at its highest id"
    parts = [("", theirs.tokenizer, theirs.text_encoder)]
    parts += [("_2", theirs.tokenizer_2, theirs.text_encoder_2)] if encoders == 2 else []
    try:
        for number, tokenizer, encoder in parts:
            name = f"learned_embeds{number}.safetensors"
            theirs.load_textual_inversion(tmp_path, weight_name=name, tokenizer=tokenizer, text_encoder=encoder)
        latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        expected = theirs(PROMPTS, num_inference_steps=STEPS, latents=latents, output_type="np", **size, **HOW).images
    finally:
        for _, tokenizer, encoder in parts:
            theirs.unload_textual_inversion(tokenizer=tokenizer, text_encoder=encoder)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    web = sdjax.load(folders(family), embeddings=[tmp_path / "webui/hat.safetensors"])
    np.testing.assert_array_equal(web([prompt.replace(WORD, "hat") for prompt in PROMPTS], **how), ours)
    assert np.abs(ours - web([prompt.replace(WORD, "cat") for prompt in PROMPTS], **how)).max() > 0.05
