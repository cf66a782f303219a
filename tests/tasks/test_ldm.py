"""LDM's conditional tasks beside PyTorch: networks of a condition, the loss, and pipelines of diffusers.

Every condition's images are compared in test_ldm_references.py.
"""

from __future__ import annotations

import json
import shutil

import diffusers
import diffusers_pixels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zoo
from ml_collections import ConfigDict
from torch_reference import channels_first, channels_last, drawn

import sdjax
from configs import ldm, openmoji_ldm
from sdjax.checkpoints.checkpoint import FORMATS, Component
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint, write_component
from sdjax.core.errors import UserError
from sdjax.data.text.tokenizer_training import train_word_pieces
from sdjax.diffusion.loss import gather, uniform_timesteps
from sdjax.diffusion.samplers import schedule_of
from sdjax.diffusion_model.conditioners.class_label import ClassConditioner
from sdjax.diffusion_model.conditioners.neighbours import NeighbourConditioner
from sdjax.diffusion_model.conditioners.tokens import LayoutConditioner
from sdjax.models.autoencoder import VARIANTS
from sdjax.models.embedders import ClassEmbedder, ClassEmbedderConfig, Rescaler, RescalerConfig
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.diffusion import drop_condition, first_stage_of, make_model
from sdjax.tasks.make import make_task

SOURCES = {"layout": "openmoji_scenes", "semantic_synthesis": "openmoji_regions"}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A folder with a VQ first stage of f = 4, drawn at random."""
    sizes = zoo.VAES["vq_f4"]
    folder = tmp_path_factory.mktemp("first_stage")
    write_component(folder / "vae", "vae", Component(sizes, drawn(FORMATS["vae"].shapes(sizes))))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_word_pieces(["a red heart", "a big blue dog", "the flag of Norway"], folder, 80)
    return folder


def config_of(name: str, first_stage, tokenizer=None, module=ldm) -> ConfigDict:
    config = module.get_config(f"{name}_tiny")
    config.task.first_stage = str(first_stage)
    config.data.source = SOURCES.get(config.task.conditioning, "openmoji")
    config.model.unet.heads = (1, 2)  # as diffusers has them in the models of diffusers_pixels.py: one program for both
    if tokenizer is not None and "tokenizer" in config.model:
        config.model.tokenizer = str(tokenizer)
    return config


def shrink(config):
    """One level is enough where the UNet is not what is tested."""
    config.model.unet.update({"channels": (32,), "heads": (1,)})
    config.model.unet.update({"depths": (1,)} if "depths" in config.model.unet else {"attention_levels": ()})


def ready(config):
    """A task with all of its parameters, every one of them random: zeros would hide mistakes."""
    mesh = make_mesh({"data": -1})
    task = make_task(config, mesh)
    return task, drawn(jax.eval_shape(task.init, jax.random.key(0))) | task.pretrained(sharded_put(mesh))


def exported(config, folder):
    """The folder that a run with random parameters leaves."""
    task, params = ready(config)
    task.export(params, folder)
    return folder


def test_embedder_and_rescaler_match_original():
    """To 1e-6: an embedding, and two bilinear halvings before a 1x1 convolution."""
    labels = np.random.default_rng(0).integers(0, 9, (2, 16, 24))
    module = Rescaler(RescalerConfig(classes=9))
    params = module.init(jax.random.key(0), jnp.asarray(labels))
    x = torch.nn.functional.one_hot(torch.from_numpy(labels), 9).permute(0, 3, 1, 2).float()
    for _ in range(2):
        x = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    kernel = torch.from_numpy(np.array(params["params"]["channel_mapper"]["kernel"]).T[:, :, None, None])
    wanted = channels_last(torch.nn.functional.conv2d(x, kernel))
    np.testing.assert_allclose(module.apply(params, jnp.asarray(labels)), wanted, atol=1e-6)
    embedder = ClassEmbedder(ClassEmbedderConfig(7, 5))
    table = embedder.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    found = embedder.apply(table, jnp.array([3, 6]))
    np.testing.assert_array_equal(found, table["params"]["embedding"]["embedding"][jnp.array([3, 6])][:, None])


def test_the_loss_is_that_of_the_original(first_stage, tmp_path):
    """Super-resolution's, with the same noise and timesteps, beside diffusers' networks: to 1e-4."""
    config = config_of("super_resolution", first_stage)
    task, params = ready(config)
    folder = tmp_path / "model"
    task.export(params, folder)
    batch = next(task.batch(params))
    key = jax.random.key(3)
    value, _ = jax.jit(task.loss)(params, batch, key, 0)
    noise_key, time_key = jax.random.split(jax.random.split(key, 3)[1])
    vae = diffusers.VQModel.from_pretrained(folder / "vqvae")
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        x0 = vae.encode(channels_first(batch["image"].astype(np.float32) / 127.5 - 1.0)).latents
        noise = channels_first(np.asarray(jax.random.normal(noise_key, (8, 8, 8, 3))))
        t = uniform_timesteps(time_key, 8, 1000)
        abar = gather(schedule_of(config.task.scheduler.to_dict()).alphas_cumprod, t)
        abar = torch.from_numpy(np.array(abar))[:, None, None, None]
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        low = channels_first(batch["low_res"].astype(np.float32) / 127.5 - 1.0)
        made = unet(torch.cat((x, low), dim=1), torch.from_numpy(np.array(t))).sample
    assert float(value) == pytest.approx(float((made - noise).square().mean()), rel=1e-4)


def test_a_first_stage_is_read_from_the_workdir_of_its_run(first_stage, tmp_path):
    shutil.copytree(first_stage, tmp_path / "run/export")
    assert first_stage_of(config_of("celebahq", tmp_path / "run")) == zoo.VAES["vq_f4"]


@pytest.mark.parametrize("written_by", ["us", "diffusers"])
def test_unconditional_model_is_a_diffusers_pipeline(written_by, first_stage, tmp_path):
    """LDMPipeline with the same seed: to 1e-3, of an exported run and of a folder that says nothing of ours."""
    if written_by == "us":
        exported(config_of("celebahq", first_stage), tmp_path)
    else:
        diffusers_pixels.write_ldm(tmp_path)
    wanted = diffusers_pixels.ldm_images(tmp_path, seed=4)
    assert np.std(wanted) > 0.05
    found = sdjax.load(tmp_path)(num_images=2, seed=4, rng="torch", steps=8)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize(("written_by", "scale"), [("us", 1.0), ("diffusers", 1.0), ("diffusers", 0.5)])
def test_diffusers_enlarges_images_as_we_do(written_by, scale, first_stage, tmp_path):
    """LDMSuperResolutionPipeline with the same seed: to 1e-3, whatever scaling_factor it passes over."""
    if written_by == "us":
        exported(config_of("super_resolution", first_stage), tmp_path)
    else:
        diffusers_pixels.write_super_resolution(tmp_path, scale)
    low = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    wanted = diffusers_pixels.super_resolution_images(tmp_path, low, seed=4)
    assert np.std(wanted) > 0.05
    found = sdjax.load(tmp_path)(init_image=low[0], seed=4, rng="torch", steps=8)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_a_scaled_upscaler_is_no_pipeline_of_diffusers(tmp_path):
    """diffusers would not divide its latents; what was read from diffusers is written for it again."""
    diffusers_pixels.write_super_resolution(tmp_path / "theirs", 0.5)
    checkpoint = read_folder(tmp_path / "theirs")
    write_checkpoint(tmp_path / "again", checkpoint)
    vae = checkpoint.components["vae"]
    scaled = Component(type(vae.config)(**{**vars(vae.config), "scaling_factor": 0.5}), vae.params)
    write_checkpoint(tmp_path / "ours", checkpoint.replace_component("vae", scaled))
    index = {name: json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("again", "ours")}
    assert index["again"]["_class_name"] == "LDMSuperResolutionPipeline"
    assert index["ours"]["_class_name"] == "LatentDiffusion"
    assert read_folder(tmp_path / "ours").components["vae"].config.scaling_factor == 0.5


def test_diffusers_generates_from_words_as_we_do(first_stage, tokenizer, tmp_path):
    """LDMTextToImagePipeline on an exported run with its tokenizer, guided by 3, with the same seed: to 1e-3.

    It reads 77 tokens and takes eight pixels for a latent, which are four here. A folder that it wrote says nothing of
    the null condition.
    """
    config = config_of("text", first_stage, tokenizer)
    with config.model.unet.unlocked():
        config.model.unet.update(in_channels=3, out_channels=3)
    config.model.bert.max_length = 77
    folder = exported(config, tmp_path / "model")
    pipe = diffusers.LDMTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["A red heart", "the dog of norway, unknownword"]
    generator = torch.Generator().manual_seed(4)
    wanted = pipe(prompts, 32, 32, num_inference_steps=8, guidance_scale=3.0, generator=generator, output_type="np")
    pipe.save_pretrained(theirs := tmp_path / "theirs")
    assert "_sdjax" not in json.loads((theirs / "model_index.json").read_text())
    null = sdjax.load(folder).model.conditioner.settings["nothing"]
    assert len(null) == 77
    ours = sdjax.load(theirs)
    assert ours.model.conditioner.settings["nothing"] == null
    settings = {"guidance_scale": 3.0, "rng": "torch", "steps": 8, "seed": 4, "width": 16, "height": 16}
    assert np.std(wanted.images) > 0.05
    np.testing.assert_allclose(ours(prompts, **settings), wanted.images, atol=1e-3)


@pytest.mark.parametrize(
    ("conditioner", "column"),
    [
        (ClassConditioner(ClassEmbedderConfig(4, 8), 3), {"label": np.arange(64, dtype=np.int32) % 3}),
        (LayoutConditioner(zoo.BERT, tuple(range(11)), 3), {"tokens": np.full((64, 11), 12, np.int32)}),
        (NeighbourConditioner(8), {"neighbours": np.ones((64, 2, 8), np.float32)}),
    ],
)
def test_dropped_conditions_are_the_null_one(conditioner, column):
    """Every one with a probability of 1, none with 0, and about half of them with 0.5."""
    (name,) = column
    null = np.broadcast_to(conditioner.null(column)[name], column[name].shape)
    for probability in (0.0, 0.5, 1.0):
        found = np.asarray(drop_condition(conditioner, column, jax.random.key(0), probability)[name])
        dropped = np.array([np.array_equal(row, other) for row, other in zip(found, null, strict=True)])
        kept = np.array([np.array_equal(row, other) for row, other in zip(found, column[name], strict=True)])
        assert (dropped ^ kept).all()
        assert abs(dropped.mean() - probability) < 0.2
        assert probability == 0.5 or dropped.mean() == probability


@pytest.mark.parametrize("name", openmoji_ldm.VARIANTS)
def test_every_condition_on_openmoji_fits_its_batch(name, first_stage, tokenizer):
    config = config_of(name, first_stage, tokenizer, openmoji_ldm)
    shrink(config)
    task, params = ready(config)
    batch = next(task.batch(params))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), task.batch_spec(8))
    value, _ = jax.eval_shape(task.loss, params, batch, jax.random.key(0), 0)
    assert value.shape == ()


@pytest.mark.parametrize("name", ["captions", "regions"])
def test_the_loss_reaches_a_conditions_networks(name, first_stage, tokenizer):
    """By cross-attention and by joined channels: no component's gradient is zero everywhere."""
    config = config_of(name, first_stage, tokenizer, openmoji_ldm)
    config.task.dropout = 0.0
    shrink(config)
    task, params = ready(config)
    rng = np.random.default_rng(0)
    batch = {n: rng.integers(0, 20, x.shape).astype(x.dtype) for n, x in task.batch_spec(2).items()}
    learned = {key: value for key, value in params.items() if key != "vae"}
    gradient = jax.jit(jax.grad(lambda p: task.loss({**params, **p}, batch, jax.random.key(0), 0)[0]))(learned)
    largest = {key: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree)) for key, tree in gradient.items()}
    assert len(largest) == 2
    assert min(largest.values()) > 0


@pytest.mark.parametrize(
    ("name", "section", "changes", "message"),
    [
        ("cin256", "unet", {"variant": "ldm_x"}, "unknown variant 'ldm_x' in config.model.unet.variant"),
        ("cin256", "unet", {"variant": "ldm_celebahq"}, "has no cross-attention, which this condition needs"),
        ("super_resolution", "unet", {"in_channels": 3}, "the UNet's in_channels are 3; the autoencoder and the"),
        ("layout", "bert", {"max_length": 33}, "config.model.bert.max_length=33; choose 3 times the objects, and 2"),
        ("super_resolution", "data", {"degradation": "blur"}, "unknown degradation 'blur'"),
        ("inpainting", "data", {"holes": (0.5, 0.1)}, "config.data.holes=0.5, 0.1: choose two shares"),
        ("celebahq", "data", {"size": 30}, "config.data.size=30 is not a multiple of 4"),
        ("text", "bert", {"vocab_size": 10}, "config.model.bert.vocab_size=10; the tokenizer"),
        ("celebahq", "task", {"conditioning": "speech"}, "unknown conditioning 'speech' in config.task.conditioning"),
        ("celebahq", "task", {"latents": "guessed"}, "unknown latents 'guessed' in config.task.latents"),
        ("cin256", "task", {"latents": "cached"}, "config.task.latents='cached' does not fit"),
    ],
)
def test_bad_configs_are_one_line(name, section, changes, message, first_stage, tokenizer):
    config = config_of(name, first_stage, tokenizer)
    place = config[section] if section in config else config.model[section]
    with place.unlocked(), place.ignore_type():
        for key, value in changes.items():
            place[key] = value
            if key == "variant" and value == "ldm_celebahq":
                for field in ("depths", "context_dim"):
                    del place[field]
    with pytest.raises(UserError) as error:
        make_task(config, make_mesh({"data": -1}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ldm.RECIPES)
def test_published_configs_fit_their_first_stages(name, tokenizer, tmp_path):
    """Channels in and out, and the width of the tokens, are what the first stage and the condition ask for."""
    config = ldm.get_config(name)
    first = VARIANTS[ldm.RECIPES[name].autoencoder]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(FORMATS["vae"].to_config(first)))
    config.task.first_stage = str(tmp_path)
    if "tokenizer" in config.model:
        config.model.tokenizer = str(tokenizer)
    make_model(config)  # which refuses what does not fit: test_bad_configs_are_one_line
