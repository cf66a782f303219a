"""CLIP's score beside transformers' own model and image processor, from sample.py's records."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sdjax.checkpoints.clip_pair import NAME, read_clip
from sdjax.core.errors import UserError
from sdjax.data.sources.folder import plain_images
from sdjax.eval import __main__ as command
from sdjax.eval.clip_score import captions_of, clip_score

PROMPTS = ["a red heart", "photo of a cat", "a cat", "", "heart heart heart heart heart heart heart heart heart"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, (prompt, size) in enumerate(zip(PROMPTS, [(40, 40), (64, 33), (28, 50), (20, 20), (91, 28)], strict=True)):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.json").write_text(json.dumps({"prompt": prompt}))
    Image.new("RGB", (90, 90)).save(folder / "grid.png")
    return folder


def test_the_score_is_that_of_transformers(clip_folder, pictures):
    """To 1e-3 of 100, images of several shapes, five of them two at a time."""
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    images = [Image.open(pictures / f"{i:05d}.png") for i in range(5)]
    words = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        seen = processor(images, return_tensors="pt")["pixel_values"]
        output = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=seen)
    cosines = (100 * output.image_embeds @ output.text_embeds.T).numpy()
    source = plain_images(pictures, without=("grid.png",))
    assert captions_of(pictures, source) == PROMPTS
    best = cosines.argmax(1)  # each image's own best prompt: scores that are surely above zero
    assert cosines.max(1).mean() > 5
    found = clip_score(read_clip(clip_folder), source, [PROMPTS[i] for i in best], 2)
    assert found == pytest.approx(float(cosines.max(1).mean()), abs=1e-3)
    worst = clip_score(read_clip(clip_folder), source, [PROMPTS[i] for i in cosines.argmin(1)], 2)
    assert worst == pytest.approx(max(float(cosines.min(1).mean()), 0.0), abs=1e-3)


def test_eval_command_needs_images_and_clip(clip_folder, pictures, tmp_path, monkeypatch, capsys):
    for flags in (
        ["--metrics=clip_score", f"--clip={clip_folder}"],
        [f"--clip={clip_folder}"],
        ["--metrics=clip_score"],
    ):
        monkeypatch.setenv("SDJAX_WEIGHTS", str(clip_folder.parent))
        monkeypatch.setattr(sys, "argv", ["eval", f"--fake={pictures}", *flags])
        command.main()
        assert capsys.readouterr().out.startswith("clip_score: ")
    monkeypatch.setenv("SDJAX_WEIGHTS", str(tmp_path))
    command.main()
    assert (
        f"clip_score is left out: no CLIP: a folder {NAME} (from openai on the Hub) is in none of"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", ["eval", f"--fake={pictures}", f"--clip={tmp_path}"])
    with pytest.raises(UserError, match=r"config.json"):
        command.main()
    (pictures / "00002.json").unlink()
    monkeypatch.setattr(sys, "argv", ["eval", f"--fake={pictures}", f"--clip={clip_folder}"])
    with pytest.raises(UserError, match=r"00002.png has no prompt: there is no 00002.json beside it"):
        command.main()
