"""Training on captions through T5: with it, or beside a frozen one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch_reference import drawn

import sdjax
import train
from configs import imagen as configs
from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import write_component
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, size
from sdjax.diffusion_model.conditioner import Host
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.diffusion import make, make_model
from sdjax.tasks.preview import preview_batch


def config_of(pictures: Path) -> Any:
    config = configs.get_config("openmoji_base_tiny")
    config.data.source = f"folder:{pictures}"
    return config


def test_parameter_totals():
    """Of a base of 16 pixels and its T5."""
    model, _ = make_model(configs.get_config("openmoji_base"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {name: size(params) for name, params in shapes.items()} == {"unet": 1_279_142, "text_encoder": 918_784}


def test_both_networks_learn_from_cleaned_captions(tmp_path: Path):
    captions = [f"Photo {i} of a DOG (red), http://x.com/{i}" for i in range(8)]
    for i, caption in enumerate(captions):
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    config = config_of(tmp_path)
    task = make(config, make_mesh({"data": -1}))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    assert set(params) == {"unet", "text_encoder"}
    batch = next(task.batch(params))
    tokenizer = transformers.T5Tokenizer.from_pretrained(config.model.tokenizer)
    cleaned = [f"photo {i} of a dog red" for i in range(8)]
    ids = tokenizer(cleaned, padding="max_length", truncation=True, max_length=16, return_tensors="np").input_ids
    assert sorted(map(tuple, batch["tokens"])) == sorted(map(tuple, ids))
    gradient = jax.jit(jax.grad(lambda p, b: task.loss(p, b, jax.random.key(1), jnp.int32(0))[0]))(params, batch)
    rows = np.abs(gradient["text_encoder"]["token_embedding"]["embedding"]).max(axis=1) > 0
    assert set(np.flatnonzero(rows)) <= set(np.unique([*ids.ravel(), 0, 1]))
    assert all(rows[np.unique(ids[ids > 0])])


def test_the_null_condition_is_the_empty_caption(pictures: Path):
    """Beside transformers' encoding of it, for prompts and for training alike, to 1e-5."""
    config = config_of(pictures)
    model, condition = make_model(config)
    conditioner: Any = model.conditioner
    params = drawn(jax.eval_shape(conditioner.init, jax.random.key(0)))
    columns = {"tokens": np.full((2, 16), 7, np.int32)}
    found = jax.jit(lambda p, c: conditioner.cond(p, conditioner.null(c)).context)(params, columns)
    folder = pictures.parent / "t5"
    sizes = conditioner.encoder.config
    write_component(folder, "text_encoder", Component(sizes, params["text_encoder"]))
    theirs = transformers.T5EncoderModel.from_pretrained(folder, attn_implementation="eager")
    made = transformers.T5Tokenizer.from_pretrained(config.model.tokenizer)(
        "", padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs(made.input_ids, attention_mask=made.attention_mask).last_hidden_state
    np.testing.assert_allclose(found, expected.expand(2, -1, -1), atol=1e-5)
    assert list(condition.tokenizers) == ["text_encoder"]


def test_a_frozen_encoder_is_read_from_another_run(pictures: Path, tmp_path: Path):
    """As the later stages of a cascade do; only the backbone is trained."""
    config = config_of(pictures)
    model, _ = make_model(config)
    conditioner: Any = model.conditioner
    encoder = drawn(jax.eval_shape(conditioner.init, jax.random.key(0)))["text_encoder"]
    write_component(tmp_path / "text_encoder", "text_encoder", Component(conditioner.encoder.config, encoder))
    config.train.trainable = ("unet",)
    with config.task.unlocked():
        config.task.components = str(tmp_path)
    mesh = make_mesh({"data": -1})
    task = make(config, mesh)
    assert set(task.frozen) == {"text_encoder"}
    read = task.pretrained(sharded_put(mesh))
    for name, leaf in flatten(encoder).items():
        np.testing.assert_array_equal(flatten(read["text_encoder"])[name], leaf, err_msg=name)


def test_parameter_totals_of_the_models_that_enlarge():
    for name in ("openmoji_sr64", "openmoji_sr128"):
        model, _ = make_model(configs.get_config(name))
        assert size(jax.eval_shape(model.init, jax.random.key(0))["unet"]) == 2_848_614


def test_a_small_image_is_the_one_that_sampling_enlarges(pictures: Path):
    """Training's columns of a batch beside those of a call with the same small image and level, to 1e-6."""
    config = configs.get_config("openmoji_sr64_tiny")
    config.data.source = f"folder:{pictures}"
    model, condition = make_model(config)
    batch = preview_batch(config, condition, 4)
    assert len({int(level) for level in batch["noise_level"]}) > 1
    columns = condition.columns(batch)
    upscaler: Any = model.conditioner.parts[0]  # pyright: ignore[reportAttributeAccessIssue]
    for i in range(4):
        host = Host("it", {"low_res_scheduler": condition.low_res_scheduler}, {}, (16, 16), (16, 16))
        given = {"init_image": batch["low_res"][i], "noise_level": int(batch["noise_level"][i])}
        for name, expected in upscaler.encode(given, host).items():
            np.testing.assert_allclose(columns[name][i], expected, atol=1e-6, err_msg=name)


def test_the_loss_depends_on_the_small_image_and_on_the_level(pictures: Path):
    """With the same noise and captions, other small images give another loss, and so do other levels."""
    config = configs.get_config("openmoji_sr64_tiny")
    config.data.source = f"folder:{pictures}"
    task = make(config, make_mesh({"data": -1}))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    frozen = drawn(task.frozen)
    batch = dict(next(task.batch(params)))
    loss = jax.jit(lambda b, key: task.loss({**params, **frozen}, b, key, jnp.int32(0))[0])
    key = jax.random.key(1)
    own = float(loss(batch, key))
    assert own == float(loss(batch, key))
    for name in ("low_res", "noise_level"):
        changed = {**batch, name: batch[name][::-1]}
        assert abs(float(loss(changed, key)) - own) > 1e-6, name


def test_a_run_leaves_a_pipeline_of_diffusers(pictures: Path, tmp_path: Path):
    """IFPipeline, from states of its own T5 and tokenizer, whose captions have 16 tokens here: the same to 1e-3."""
    config = config_of(pictures)
    config.train.update(steps=2, checkpoint_every=2)
    folder = train.train_and_evaluate(config, tmp_path / "run")
    theirs = diffusers.IFPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red heart", "an image of the number 3"]

    def states(texts: list[str]) -> torch.Tensor:
        made = theirs.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
        with torch.no_grad():
            return theirs.text_encoder(made.input_ids, attention_mask=made.attention_mask).last_hidden_state

    how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    wanted = theirs(
        prompt_embeds=states(prompts),
        negative_prompt_embeds=states(["", ""]),
        generator=torch.Generator().manual_seed(7),
        **how,
    ).images
    assert wanted.std() > 0.02
    pipe = sdjax.load(tmp_path / "run")
    assert pipe.settings == {"steps": 3, "guidance_scale": 3.0, "text_length": 16}
    found = pipe(prompts, steps=4, seed=7, rng="torch", batch_size=2)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_an_efficient_network_is_trained_stored_and_follows_a_base(pictures: Path, tmp_path: Path):
    """A cascade of both runs, whose second stage gives what its own parameters give after they were stored."""
    base, larger = config_of(pictures), configs.get_config("sr256_tiny")
    base.data.size = 8
    larger.data.source, larger.task.components = f"folder:{pictures}", str(tmp_path / "base")
    for config, name in ((base, "base"), (larger, "larger")):
        config.train.update(steps=2, checkpoint_every=2)
        train.train_and_evaluate(config, tmp_path / name)
    cascade = sdjax.load(tmp_path / "base", then=tmp_path / "larger")
    how = {"steps": 3, "stages": ["steps=3,noise_level=100"], "seed": 1, "output": "stages"}
    small, large = cascade("a red heart", **how)
    assert (small.shape, large.shape) == ((1, 8, 8, 3), (1, 16, 16, 3))
    alone = sdjax.load(tmp_path / "larger")
    np.testing.assert_array_equal(alone("a red heart", init_image=small[0], steps=3, noise_level=100, seed=1), large)
    alone.save(tmp_path / "copy")
    again = sdjax.load(tmp_path / "copy")
    for path, leaf in flatten(alone.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "nowhere"}, "nowhere holds no tokenizer of T5's: neither tokenizer.json nor spiece.model"),
        ({"text_encoders.text_encoder.vocab_size": 100}, "text_encoder.vocab_size=100; the tokenizer"),
        ({"text_encoders.text_encoder.variant": "t5"}, "unknown variant 't5' in config.model.text_encoders.text_enc"),
        ({"unet.text_dim": 64}, "the UNet attends to 64 features, the condition gives 128"),
    ],
)
def test_bad_configs_are_one_line(pictures: Path, change: dict[str, Any], message: str):
    config = config_of(pictures)
    config.model.update_from_flattened_dict(change)
    with pytest.raises(UserError) as error:
        make(config, make_mesh({"data": -1}))
    assert message in str(error.value)
