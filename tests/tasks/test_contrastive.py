"""CLIP's contrastive task beside transformers' CLIPModel, on meshes, and over a run that stops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import children
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from torch_reference import drawn

import train
from configs import clip as clip_config
from sdjax.checkpoints.clip_pair import read_clip
from sdjax.checkpoints.mapping import read
from sdjax.checkpoints.networks import clip, clip_image
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.data.text.tokenizers import load_tokenizer
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.contrastive import IMAGE, LARGEST_LOGIT_SCALE, LOGIT_SCALE, TEXT, bounded, sizes_of_towers
from sdjax.tasks.make import make_task

MESH = {"data": -1}
SCRIPT = Path(__file__).with_name("contrastive_on_devices.py")


def config_of(pictures):
    config = clip_config.get_config("tiny")
    config.data.source = f"folder:{pictures}"
    config.task.export_dtype = "float32"
    return config


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The config, the task, random parameters, and the folder that they are exported to."""
    config = config_of(pictures)
    task = make_task(config, make_mesh(MESH))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    params[LOGIT_SCALE] = np.float32(2.0)
    folder = tmp_path_factory.mktemp("clip") / "export"
    task.export(params, folder)
    return config, task, params, folder


def as_ours(model: torch.nn.Module, config) -> dict[str, np.ndarray]:
    """The gradients of a CLIPModel under our names."""
    tensors = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    text, image = sizes_of_towers(config)
    tables = {TEXT: (clip.TABLE, clip.shapes(text), "text"), IMAGE: (clip_image.TABLE, clip_image.shapes(image), "v")}
    found = {
        name: read(table, {k: v for k, v in tensors.items() if k.startswith(first)}, shapes, np.float32, "")
        for name, (table, shapes, first) in tables.items()
    }
    return flatten({**found, LOGIT_SCALE: tensors["logit_scale"]})


def test_loss_and_gradients_are_those_of_transformers(trained):
    """To 1e-5, of a batch of the data, by the model and the image processor that are read from the export."""
    config, task, params, folder = trained
    batch = next(task.batch(params))
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(list(batch["image"]), return_tensors="pt")["pixel_values"]
    ids = torch.from_numpy(batch["tokens"]).long()
    expected = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    expected.loss.backward()
    (value, metrics), gradients = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, None, 0)
    assert float(value) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    assert float(metrics["logit_scale"]) == pytest.approx(np.exp(2.0))
    right = expected.logits_per_image.argmax(1).numpy() == np.arange(len(ids))
    assert float(metrics["accuracy"]) == right.mean()
    wanted, found = as_ours(model, config), flatten(gradients)
    assert wanted.keys() == found.keys()
    for name, gradient in found.items():
        np.testing.assert_allclose(
            gradient, wanted[name], atol=1e-5 * max(1.0, np.abs(wanted[name]).max()), err_msg=name
        )


def test_the_export_has_its_own_tokenizer_and_is_read_again(trained):
    """transformers cuts captions where the text tower ends; what `read_clip` reads is what was written, to the bit."""
    _, task, params, folder = trained
    captions = ["red heart", "man: light skin tone, red hair " * 4, ""]
    theirs = transformers.CLIPProcessor.from_pretrained(folder)
    words = theirs(text=captions, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    pair = read_clip(folder)
    assert words.shape == task.batch_spec(3)["tokens"].shape
    np.testing.assert_array_equal(words, load_tokenizer(folder, 20).encode(captions))
    assert pair.logit_scale == 2.0
    for name, tower in {TEXT: pair.text_params, IMAGE: pair.image_params}.items():
        jax.tree.map(np.testing.assert_array_equal, tower, params[name])


def test_the_temperature_is_clipped_and_comes_back():
    """Logits are at most 100 cosines; beyond, a gradient passes only if it lowers the scale."""
    slope = jax.vmap(jax.grad(lambda x, sign: sign * bounded(x)))
    below, beyond = LARGEST_LOGIT_SCALE - 0.1, LARGEST_LOGIT_SCALE + 0.1
    x = np.float32([below, below, beyond, beyond])
    np.testing.assert_allclose(bounded(x), [below, below, LARGEST_LOGIT_SCALE, LARGEST_LOGIT_SCALE], rtol=1e-6)
    np.testing.assert_array_equal(slope(x, np.float32([1, -1, 1, -1])), [1, -1, 1, 0])


def test_the_batch_is_that_of_all_devices(trained, tmp_path):
    """Loss and every gradient over 2, 4 and 8 devices are those of one, to 1e-5."""
    config, task, params, folder = trained
    batch = next(task.batch(params))
    np.savez(tmp_path / "batch.npz", **batch)
    paths = {"XLA_FLAGS": children.devices(8), "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(folder), str(tmp_path), config.data.source]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, *others = (np.load(tmp_path / f"{count}.npz") for count in (1, 2, 4, 8))
    value, _ = jax.jit(task.loss)(params, batch, None, 0)
    assert float(one["loss"]) == pytest.approx(float(value), rel=1e-5)
    for other in others:
        assert set(other.files) == set(one.files)
        for name in one.files:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_halves_are_the_whole(pictures, tmp_path):
    """2 + 2 steps leave the state of 4, to the bit; a run may begin from what another exported."""
    config = config_of(pictures)
    exports = [train.train_and_evaluate(config, tmp_path / "whole")]
    for steps in (2, 4):
        config.train.steps = steps
        exports.append(train.train_and_evaluate(config, tmp_path / "halves"))
    whole, halves = (state_of(tmp_path / name / "checkpoints" / "4") for name in ("whole", "halves"))
    assert whole["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, whole, halves)
    config.task.initial = str(exports[0])
    task = make_task(config, make_mesh(MESH))
    jax.tree.map(np.testing.assert_array_equal, task.pretrained(lambda array, name: array), whole["ema"])
    config.model.text_encoder.layers = 1
    with pytest.raises(UserError, match=r"config\.task\.initial=.* is a CLIP of other sizes than config\.model"):
        make_task(config, make_mesh(MESH)).pretrained(lambda array, name: array)


def state_of(step: Path) -> dict:
    restored = ocp.StandardCheckpointer().restore((step / "state").absolute())
    return jax.tree.map(np.asarray, restored)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "model.text_encoder",
            {"projection_dim": 8},
            "text_encoder.projection_dim=8 must be that of image_encoder, 16",
        ),
        ("model.text_encoder", {"vocab_size": 300}, "has 2048 tokens, of which 2047 is the end"),
        ("model.image_encoder", {"variant": "vit"}, "unknown variant 'vit' in config.model.image_encoder.variant"),
        ("data", {"size": 48}, "config.data.size=48; the image encoder is made for images of 32"),
        ("train", {"accumulate": 2}, "config.train.accumulate=2: each caption is held against all images"),
        ("model", {"tokenizer": "nowhere"}, "nowhere holds no tokenizer"),
    ],
)
def test_bad_configs_are_one_line(section, change, message):
    config = clip_config.get_config("tiny")
    place = config
    for name in section.split("."):
        place = place[name]
    place.update(change)
    with pytest.raises(UserError) as error:
        make_task(config, make_mesh(MESH))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_captions_are_needed(pictures):
    config = config_of(pictures)
    config.data.source = f"pictures:{pictures}"
    with pytest.raises(UserError, match="has no captions, and this run needs them"):
        make_task(config, make_mesh(MESH)).batch({})
