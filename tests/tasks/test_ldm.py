"""LDM's conditional tasks beside PyTorch: what the UNet is told, the loss, and whole pipelines of diffusers."""

from __future__ import annotations

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.latent_diffusion_uncond import pipeline_latent_diffusion_uncond as plain_pipeline
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as text_pipeline
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion_superresolution as large_pipeline
from PIL import Image
from sdjax.pipeline.conditional import ConditionalPipeline
from sdjax.tasks.inpainting import HoleConditioner
from sdjax.tasks.latent.networks import sizes_of
from sdjax.tasks.ldm.model import draw, load_model
from torch_reference import channels_first, channels_last, drawn

from configs import ldm, openmoji_ldm
from sdjax.convert.components import FORMATS, Component
from sdjax.convert.folder import read_component, read_folder, write_component
from sdjax.convert.opening import kind_of
from sdjax.core.errors import UserError
from sdjax.core.prng import image_keys
from sdjax.data.tokenizer_training import train_word_pieces
from sdjax.data.word_pieces import load_word_pieces
from sdjax.diffusion.loss import gather, uniform_timesteps
from sdjax.diffusion.samplers import SamplerOptions, first_noise, make_table, schedule_of
from sdjax.models.autoencoder import VARIANTS
from sdjax.models.embedders import ClassEmbedder, ClassEmbedderConfig, Rescaler, RescalerConfig
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import placer
from sdjax.tasks.make import make_task

SMALL = {"channels": (8, 8, 16), "layers_per_block": 1, "groups": 4, "codes": 64}
SOURCES = {"layout": "openmoji_scenes", "semantic_synthesis": "openmoji_regions"}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A folder with a VQ first stage of f = 4, drawn at random."""
    sizes = sizes_of({"variant": "vq_f4", **SMALL}, VARIANTS, "")
    params = drawn(FORMATS["vae"].shapes(sizes))
    folder = tmp_path_factory.mktemp("first_stage")
    write_component(folder / "vae", "vae", Component(sizes, params))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_word_pieces(["a red heart", "a big blue dog", "the flag of Norway"], folder, 80)
    return folder


def config_of(name: str, first_stage, tokenizer=None, module=ldm):
    config = module.get_config(f"{name}_tiny")
    config.task.first_stage = str(first_stage)
    config.data.source = SOURCES.get(config.task.name, "openmoji")
    if tokenizer is not None and "tokenizer" in config.model:
        config.model.tokenizer = str(tokenizer)
    return config


def ready(config):
    """A task with all of its parameters, every one of them random: zeros would hide mistakes."""
    mesh = make_mesh({"data": -1})
    task = make_task(config, mesh)
    return task, drawn(jax.eval_shape(task.init, jax.random.key(0))) | task.stored(placer(mesh))


def exported(config, folder):
    task, params = ready(config)
    task.export(params, folder)
    return task, params, folder


def test_the_embedder_and_the_rescaler_are_those_of_the_original():
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


def test_what_an_inpainting_model_sees_is_that_of_the_original_script(first_stage):
    """CompVis/latent-diffusion, scripts/inpaint.py, to 1e-5: the picture without its hole, and the nearest mask."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    mask = (rng.random((2, 16, 16, 1)) < 0.4).astype(np.uint8)
    vae = diffusers.VQModel.from_pretrained(first_stage / "vae")
    picture, hole = channels_first(image.astype(np.float32) / 255.0), channels_first(mask.astype(np.float32))
    with torch.no_grad():
        seen = vae.encode((1 - hole) * picture * 2.0 - 1.0).latents
    small = torch.nn.functional.interpolate(hole * 2.0 - 1.0, size=seen.shape[-2:])
    wanted = channels_last(torch.cat((seen, small), dim=1))
    sizes = sizes_of({"variant": "vq_f4", **SMALL}, VARIANTS, "")
    params = {"vae": read_params(first_stage)}
    found = HoleConditioner(sizes).cond(params, {"image": image, "mask": mask}).concat
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    made = rng.random((2, 16, 16, 3)).astype(np.float32)
    kept = np.asarray(HoleConditioner(sizes).finished(jnp.asarray(made), {"image": image, "mask": mask}))
    inside = mask[..., 0] > 0
    np.testing.assert_array_equal(np.round(kept[~inside] * 255), image[~inside])
    np.testing.assert_array_equal(kept[inside], made[inside])


def read_params(folder):
    return read_component(folder / "vae", "vae").params


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


def given_noise(monkeypatch, module, noise: np.ndarray) -> None:
    """diffusers draws `noise` in place of its own."""
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: channels_first(noise))


def table_of(checkpoint, steps: int):
    chosen = SamplerOptions.from_scheduler_config(checkpoint.scheduler, "ddim")
    return make_table("ddim", schedule_of(checkpoint.scheduler), steps, chosen)


def test_diffusers_enlarges_pictures_as_we_do(first_stage, tmp_path, monkeypatch):
    """LDMSuperResolutionPipeline on an exported run, from the same noise: to 1e-3. And at another size."""
    _, _, ours = exported(config_of("super_resolution", first_stage), tmp_path / "model")
    pipe = diffusers.LDMSuperResolutionPipeline.from_pretrained(ours)
    pipe.save_pretrained(folder := tmp_path / "theirs")
    assert kind_of(ours) == kind_of(folder) == "ldm"
    checkpoint = read_folder(folder)
    model, params = load_model(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    keys = image_keys(0, jnp.arange(2))
    for height, width in ((8, 8), (4, 12)):
        low = np.random.default_rng(1).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
        given_noise(monkeypatch, large_pipeline, np.asarray(first_noise(keys, (height, width, 3))))
        picture = channels_first(low.astype(np.float32) / 127.5 - 1.0)
        wanted = pipe(picture, num_inference_steps=4, output_type="np").images
        size = model.conditioner.size({"low_res": low})
        assert size == (4 * height, 4 * width)
        found = draw(model, params, table_of(checkpoint, 4), {"low_res": low}, 1.0, keys, size)
        assert np.std(wanted) > 0.05
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_diffusers_paints_words_as_we_do(first_stage, tokenizer, tmp_path, monkeypatch):
    """LDMTextToImagePipeline on an exported run with its tokenizer, guided by 3, from the same noise: to 1e-3."""
    config = config_of("text", first_stage, tokenizer)
    with config.model.unet.unlocked():
        config.model.unet.update(in_channels=3, out_channels=3)
    _, _, folder = exported(config, tmp_path / "model")
    checkpoint = read_folder(folder)
    model, params = load_model(checkpoint)
    pipe = diffusers.LDMTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompts, keys = ["A red heart", "the dog of norway, unknownword"], image_keys(0, jnp.arange(2))
    given_noise(monkeypatch, text_pipeline, np.asarray(first_noise(keys, (8, 8, 3))))
    pipe.tokenizer.model_max_length = 32
    encode = pipe.tokenizer.__call__
    monkeypatch.setattr(
        type(pipe.tokenizer), "__call__", lambda self, text, **kwargs: encode(text, **{**kwargs, "max_length": 32})
    )
    wanted = pipe(prompts, 32, 32, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    words = load_word_pieces(checkpoint.tokenizers["bert"], 32)
    tokens, tokens_of_nothing = words.encode(prompts), words.encode([""])[0]
    found = draw(model, params, table_of(checkpoint, 4), {"tokens": tokens}, 3.0, keys, (32, 32))
    pipe.save_pretrained(theirs := tmp_path / "theirs")
    assert "_sdjax" not in json.loads((theirs / "model_index.json").read_text())
    settings = ConditionalPipeline("theirs", read_folder(theirs)).settings
    assert settings["nothing"] == checkpoint.settings["nothing"] == tokens_of_nothing.tolist()
    assert np.std(wanted) > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("written_by", ["us", "diffusers"])
def test_an_unconditional_run_is_a_pipeline_of_diffusers(written_by, first_stage, tmp_path, monkeypatch):
    """LDMPipeline, from the same noise: to 1e-3. And a folder that diffusers wrote, which says nothing of ours."""
    _, _, folder = exported(config_of("celebahq", first_stage), tmp_path / "model")
    pipe = diffusers.LDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if written_by == "diffusers":
        folder = tmp_path / "theirs"
        pipe.save_pretrained(folder)
        assert "_sdjax" not in json.loads((folder / "model_index.json").read_text())
    checkpoint = read_folder(folder)
    model, params = load_model(checkpoint)
    keys, side = image_keys(0, jnp.arange(2)), pipe.unet.config.sample_size
    given_noise(monkeypatch, plain_pipeline, np.asarray(first_noise(keys, (side, side, 3))))
    wanted = pipe(2, num_inference_steps=4, output_type="np").images
    found = draw(model, params, table_of(checkpoint, 4), {"nothing": np.zeros(2)}, 1.0, keys, (4 * side, 4 * side))
    assert np.std(wanted) > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """Pictures with the embeddings of what is near each."""
    folder, rng, lines = tmp_path_factory.mktemp("neighbours"), np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"{i}.png")
        np.save(folder / f"{i}.npy", rng.standard_normal((3, 24)))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "", "neighbours": f"{i}.npy"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", ["cin256", "layout", "semantic", "inpainting", "rdm"])
def test_other_models_come_back_as_they_were_written(name, first_stage, neighbours, tmp_path):
    """The same pictures from what was read as from what was written; guidance by another scale compiles nothing."""
    config = config_of(name, first_stage)
    if name == "rdm":
        config.data.source = f"folder:{neighbours}"
        with config.model.unet.unlocked():
            config.model.unet.update(in_channels=3, out_channels=3)
    task, params, folder = exported(config, tmp_path / "model")
    checkpoint = read_folder(folder)
    model, read = load_model(checkpoint)
    batch = next(task.batch(params))
    columns = {key: value[:2] for key, value in batch.items()}
    keys, table = image_keys(0, jnp.arange(2)), table_of(checkpoint, 2)
    found = draw(model, read, table, columns, 2.0, keys, (32, 32))
    np.testing.assert_allclose(found, draw(model, params, table, columns, 2.0, keys, (32, 32)), atol=1e-5)
    compiled = draw._cache_size()
    other = draw(model, read, table, columns, 3.0, keys, (32, 32))
    assert draw._cache_size() == compiled
    assert (np.abs(other - found).max() > 1e-4) == (model.conditioner.silent(columns) is not None)


def test_left_out_conditions_are_left_out(first_stage):
    """With every condition left out the loss does not know the classes; with none left out it does."""
    config = config_of("cin256", first_stage)
    values = {}
    for share in (0.5, 1.0):
        config.task.dropout = share
        task, params = ready(config)
        batch = next(task.batch(params))
        loss = jax.jit(task.loss)
        shuffled = {**batch, "label": (batch["label"] + 1) % 10}
        values[share] = [float(loss(params, rows, jax.random.key(0), 0)[0]) for rows in (batch, shuffled)]
    assert values[0.5][0] != values[0.5][1]
    assert values[1.0][0] == values[1.0][1]


@pytest.mark.parametrize("name", openmoji_ldm.VARIANTS)
def test_every_condition_on_openmoji_has_a_batch_and_a_gradient(name, first_stage, tokenizer):
    """What is told reaches every network that learns: no gradient is zero everywhere."""
    config = config_of(name, first_stage, tokenizer, openmoji_ldm)
    config.task.dropout = 0.0
    task, params = ready(config)
    batch = next(task.batch(params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), task.specimen(8)
    )
    learned = {key: value for key, value in params.items() if key != "vae"}
    gradient = jax.jit(jax.grad(lambda p: task.loss({**params, **p}, batch, jax.random.key(0), 0)[0]))(learned)
    zero = [key for key, value in gradient.items() if max(float(jnp.abs(x).max()) for x in jax.tree.leaves(value)) == 0]
    assert zero == []


@pytest.mark.parametrize(
    ("name", "section", "changes", "message"),
    [
        ("cin256", "unet", {"variant": "ldm_x"}, "unknown variant 'ldm_x' in config.model.unet.variant"),
        ("cin256", "unet", {"variant": "ldm_celebahq"}, "has no cross-attention, which this task needs"),
        ("super_resolution", "unet", {"in_channels": 3}, "config.model.unet.in_channels=3; the first stage and the"),
        ("layout", "bert", {"max_length": 33}, "config.model.bert.max_length=33; choose 3 times the objects, and 2"),
        ("super_resolution", "data", {"degradation": "blur"}, "unknown degradation 'blur'"),
        ("inpainting", "data", {"holes": (0.5, 0.1)}, "config.data.holes=0.5, 0.1: choose two shares"),
        ("celebahq", "data", {"size": 30}, "config.data.size=30 is not a multiple of the first stage's 4"),
        ("text", "bert", {"vocab_size": 10}, "config.model.bert.vocab_size=10; the tokenizer"),
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
    specimen = make_task(config, make_mesh({"data": -1})).specimen(2)
    assert specimen["image"].shape == (2, config.data.size, config.data.size, 3)
