"""Prompts through T5: each is encoded once, and as it is cleaned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zoo
from tiny_checkpoints import random_params

from sdjax.checkpoints.checkpoint import ALL_FORMATS, Checkpoint, Component
from sdjax.checkpoints.families import FAMILIES
from sdjax.data.sources import openmoji
from sdjax.data.text.t5_tokenizer import load_t5_tokenizer
from sdjax.data.text.tokenizer_training import train_unigrams
from sdjax.diffusion_model import sampling
from sdjax.diffusion_model.model import build_model
from sdjax.pipeline import execute
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.text_states import MOST, TextStates

CALL: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "seed": 1, "num_images": 2}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: Any) -> Pipeline:
    """A model of 16 pixels a side, by a UNet that attends to 12 tokens."""
    folder = tmp_path_factory.mktemp("t5")
    train_unigrams(list(openmoji.captions().values())[:400], folder, 390)
    sizes = {"unet": zoo.ldm_unet(32), "text_encoder": zoo.T5}
    extra = {"sample_size": zoo.SIDE}
    parts = {n: Component(s, random_params(ALL_FORMATS[n].shapes(s), 0), extra) for n, s in sizes.items()}
    scheduler = {**FAMILIES["adm_256"].scheduler, "variance_type": "fixed_small", "_class_name": "DDIMScheduler"}
    made = Checkpoint(
        components=parts, scheduler=scheduler, conditioning="text_t5", settings={"text_length": zoo.TOKENS}
    )
    tokenizers: Any = {"text_encoder": load_t5_tokenizer(folder, zoo.TOKENS)}
    return Pipeline("tiny", made, build_model(made, tokenizers, "float32", "tiny"), tokenizers)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Tokens that were encoded, as they come."""
    found, own = [], sampling.encode_text

    def encode_text(model: Any, params: Any, tokens: Any) -> Any:
        found.extend(tuple(row.tolist()) for row in np.asarray(tokens))
        return own(model, params, tokens)

    monkeypatch.setattr(sampling, "encode_text", encode_text)
    return found


def test_each_prompt_is_encoded_once(pipe: Pipeline, encoded: list, monkeypatch: pytest.MonkeyPatch):
    prompts = ["a red heart", "a big dog", "A RED  heart "]
    images = pipe(prompts, **CALL)
    assert len(encoded) == len(set(encoded)) == 3, "two prompts and the null condition"
    np.testing.assert_array_equal(pipe(prompts, **CALL), images)
    pipe("a cat", negative_prompt="a big dog", **CALL)
    assert len(encoded) == 4
    monkeypatch.setattr(execute, "_states", lambda *args: {})
    np.testing.assert_allclose(pipe(prompts, **CALL), images, atol=1e-4)
    assert len(encoded) == 4


def test_conditions_decide_the_image(pipe: Pipeline):
    """A negative prompt takes the place of the empty one; without guidance it has no say."""
    image = pipe("a red heart", **CALL)
    assert np.abs(pipe("a red heart", negative_prompt="", **CALL) - image).max() == 0
    assert np.abs(pipe("a red heart", negative_prompt="a cat", **CALL) - image).max() > 1e-3
    assert np.abs(pipe("a cat", **CALL) - image).max() > 1e-3
    plain = CALL | {"guidance_scale": 1.0}
    same = pipe("a red heart", negative_prompt="a red heart", **CALL)
    np.testing.assert_allclose(same, pipe("a red heart", **plain), atol=1e-4)


def test_what_is_cut_is_said(pipe: Pipeline, caplog: pytest.LogCaptureFixture):
    pipe("a red heart and " * 9, **CALL)
    (record,) = [record for record in caplog.records if "was cut from the prompt" in record.message]
    assert "it has more than 12 tokens" in record.message


def test_the_states_that_were_not_asked_for_longest_go_first():
    states, made = TextStates(), []

    def get(number: int) -> None:
        states.get(np.array([number]), lambda tokens: made.append(int(tokens[0])) or tokens)

    for number in [*range(MOST), 0, MOST, 0, 1]:
        get(number)
    assert made == [*range(MOST), MOST, 1]
