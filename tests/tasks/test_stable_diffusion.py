"""Training of Stable Diffusion beside PyTorch: what is prepared, what the loss is, what is left at the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image
from sdjax.tasks.latent.networks import tokenizers_of
from sdjax.tasks.stable_diffusion import make

import sdjax
import train
from configs import stable_diffusion_training as configs
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.data.buckets import cover, resize_crop
from sdjax.data.prepared import PreparedSource
from sdjax.parallel.batches import put_batch
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import placer
from sdjax.prepare import prepare
from sdjax.tasks.make import make_task
from sdjax.training.step import init_state, make_step

TINY = tuple(configs.TINY)


def config_of(name: str, pictures: Path, prepared: Path | str = "", **data: object) -> ConfigDict:
    config = configs.get_config(name)
    config.data.source = f"folder:{pictures}"
    config.data.prepared = str(prepared)
    config.data.update(data)
    return config


@pytest.fixture(scope="module", params=TINY)
def case(request, pictures, tmp_path_factory):
    """A tiny config with its prepared data, and the folder of its networks that PyTorch reads."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(request.param, pictures, folder / "data", crop="centre")
    prepare(config, folder / "data", batch_size=5)
    task = make(config, make_mesh({"data": -1}))
    params = jax.jit(task.init)(jax.random.key(3)) | task.stored(placer(make_mesh({"data": -1})))
    params["unet"] = spoken(params["unet"])
    config.task.export_dtype = "float32"
    task.export(params, folder / "theirs")
    return config, task, params, folder


def spoken(unet: dict) -> dict:
    """A UNet that says something: the last layers of a fresh one are zeros, and stop every gradient."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape).astype("f"), unet)


def texts(folder: Path, captions: list[str]) -> dict[str, torch.Tensor]:
    """What diffusers tells the UNet of captions (StableDiffusionPipeline, StableDiffusionXLPipeline encode_prompt)."""
    states, pooled, xl = [], None, (folder / "text_encoder_2").exists()
    for number in ("", "_2") if xl else ("",):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")
        kind = transformers.CLIPTextModelWithProjection if number else transformers.CLIPTextModel
        encoder = kind.from_pretrained(folder / f"text_encoder{number}").eval()
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2] if xl else output.last_hidden_state)
        pooled = output.text_embeds if number else None
    return {"context": torch.cat(states, -1)} | ({} if pooled is None else {"pooled": pooled})


def test_prepared_rows_are_what_pytorch_says(case):
    """Moments and embeddings of every picture, stored in half precision: 2e-3 of their largest value."""
    config, _, _, folder = case
    source = PreparedSource(folder / "data")
    assert len(source) == 24
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "theirs" / "vae").eval()
    for index in (0, 1, 23):
        row, name = source[index], source.id(index)
        picture = np.asarray(Image.open(Path(config.data.source.removeprefix("folder:")) / name))
        target = source.table[source.buckets[index]]
        whole = cover(*picture.shape[:2], target)
        top, left = (whole.height - target.height) // 2, (whole.width - target.width) // 2
        cut = resize_crop(picture, target, top, left).astype(np.float32) / 127.5 - 1.0
        with torch.no_grad():
            moments = vae.encode(torch.tensor(cut).permute(2, 0, 1)[None]).latent_dist.parameters
        expected = {"moments": moments[0].permute(1, 2, 0)}
        expected |= {k: v[0] for k, v in texts(folder / "theirs", [f"a picture of the number {index}"]).items()}
        for key, value in expected.items():
            np.testing.assert_allclose(row[key], value, atol=2e-3 * float(np.abs(value).max()), err_msg=key)
        if "sizes" in row:
            assert row["sizes"].tolist() == [*picture.shape[:2], top, left, *target]
    blank = texts(folder / "theirs", [""])
    for key, value in source.constants.items():
        expected = np.zeros_like(value) if "pooled" in source.constants else blank[key][0]
        np.testing.assert_allclose(value, expected, atol=2e-3 * 4, err_msg=key)


def reference_loss(config: ConfigDict, folder: Path, batch: dict, blank: dict, key: jax.Array) -> float:
    """The loss of diffusers' examples/text_to_image train scripts, from the same random draws."""
    latent_key, drop_key, rest = jax.random.split(key, 3)
    noise_key, time_key = jax.random.split(rest)
    mean, logvar = np.split(np.float32(batch["moments"]), 2, -1)
    draw = np.asarray(jax.random.normal(latent_key, mean.shape))
    vae = diffusers.AutoencoderKL.load_config(folder / "vae")
    x0 = (mean + np.exp(0.5 * logvar) * draw) * vae["scaling_factor"]
    noise = np.asarray(jax.random.normal(noise_key, x0.shape))
    if config.task.offset_noise:
        shift = jax.random.normal(jax.random.fold_in(noise_key, 1), (len(x0), 1, 1, 4))
        noise = noise + config.task.offset_noise * np.asarray(shift)
    t = torch.tensor(np.array(jax.random.randint(time_key, (len(x0),), 0, 1000)))
    dropped = np.asarray(jax.random.bernoulli(drop_key, config.task.caption_dropout, (len(x0),)))
    told = {
        name: np.where(dropped[:, None], blank[name], batch[name])
        if name == "pooled"
        else np.where(dropped[:, None, None], blank[name], batch[name])
        for name in blank
    }
    scheduler = diffusers.DDPMScheduler.from_config(diffusers.DDIMScheduler.load_config(folder / "scheduler"))
    x0, noise = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x0, noise))
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    added = None
    if "pooled" in told:
        added = {"text_embeds": torch.tensor(told["pooled"]).float(), "time_ids": torch.tensor(batch["sizes"])}
    with torch.no_grad():
        context = torch.tensor(told["context"]).float()
        output = unet(scheduler.add_noise(x0, noise, t), t, context, added_cond_kwargs=added).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x0, noise, t) if velocity else noise
    loss = (output - target).square().mean((1, 2, 3))
    if config.task.weighting == "min_snr":  # train_text_to_image.py, snr_gamma = 5, v_prediction
        abar = scheduler.alphas_cumprod[t]
        snr = abar / (1 - abar)
        loss = loss * torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    return float(loss.mean())


def test_the_loss_is_that_of_diffusers(case):
    """To 1e-5 of it: noise, offset, timesteps, dropped captions, target, weights, conditions."""
    config, task, params, folder = case
    config = config.copy_and_resolve_references()
    config.task.caption_dropout = 0.5
    batch = next(task.batch(params))
    source = PreparedSource(folder / "data")
    for number in range(2):
        key = jax.random.key(number)
        value, _ = jax.jit(make(config, make_mesh({"data": -1})).loss)(params, batch, key, 0)
        expected = reference_loss(config, folder / "theirs", batch, dict(source.constants), key)
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_frozen_text_is_the_prepared_one(case):
    """The same loss from tokens as from stored embeddings, but for their half precision (1e-3)."""
    config, task, params, folder = case
    batch = next(task.batch(params))
    tokens = config.copy_and_resolve_references()
    tokens.task.text = "frozen"
    captions = [f"a picture of the number {i}" for i in range(24)]
    ids = np.stack([t.encode(captions) for t in tokenizers_of(task_system(tokens), "")], axis=1)
    source = PreparedSource(folder / "data")
    stored = [source[i]["moments"] for i in range(24)]
    rows = [next(i for i in range(24) if np.array_equal(stored[i], row)) for row in batch["moments"]]
    told = {**{k: v for k, v in batch.items() if k in ("moments", "sizes")}, "tokens": ids[rows]}
    other = make(tokens, make_mesh({"data": -1}))
    params_of_tokens = params | {"blank": other.stored(placer(make_mesh({"data": -1})))["blank"]}
    a, b = (
        jax.jit(t.loss)(p, x, jax.random.key(0), 0)[0]
        for t, p, x in ((task, params, batch), (other, params_of_tokens, told))
    )
    assert float(b) == pytest.approx(float(a), rel=1e-3)


def task_system(config: ConfigDict):
    from sdjax.tasks.latent.networks import system_of

    return system_of(config)


def test_a_run_from_pictures_to_a_folder_that_diffusers_loads(pictures, tmp_path, monkeypatch):
    """Prepared in buckets, trained with one compilation for each, exported, sampled."""
    config = config_of("sdxl_tiny", pictures, tmp_path / "data")
    config.train.sample_every = 100
    prepare(config, tmp_path / "data", batch_size=3)
    assert np.bincount(PreparedSource(tmp_path / "data").buckets).tolist() == [8, 16]
    steps, shapes = [], []

    def watched(*args, **settings):
        steps.append(make_step(*args, **settings))

        def step(state, frozen, batch):
            shapes.append(batch["moments"].shape)
            return steps[-1](state, frozen, batch)

        return step

    monkeypatch.setattr(train, "make_step", watched)
    folder = train.train_and_evaluate(config, tmp_path / "run")
    assert len(shapes) == config.train.steps
    assert set(shapes) == {(8, 8, 32, 8), (8, 16, 16, 8)}
    assert steps[-1]._cache_size() == 2  # pyright: ignore[reportFunctionMemberAccess]
    pipe = sdjax.load(folder)
    image = pipe("a red heart", steps=2, seed=1)
    ours = np.asarray(pipe.params["unet"]["conv_in"]["kernel"])
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert theirs.unet.config.sample_size == 16
    np.testing.assert_array_equal(theirs.unet.conv_in.weight.detach().permute(2, 3, 1, 0), ours)
    assert np.isfinite(image).all()
    assert image.std() > 0


@pytest.mark.parametrize("text", ["frozen", "trained"])
def test_only_what_shall_learn_learns(text, pictures, tmp_path):
    """With task.text "trained" the text encoder moves with the UNet; with "frozen" it stays, to the bit."""
    config = config_of("sd1_tiny", pictures, tmp_path / "tokens")
    config.task.update(text=text, export_dtype="float32")
    prepare(config, tmp_path / "tokens")
    mesh = make_mesh({"data": -1})
    task, optimizer = make_task(config, mesh), optax.sgd(1.0)
    stored = task.stored(placer(mesh))
    frozen = {name: stored.pop(name) for name in task.frozen}
    state = init_state(task, optimizer, 0, mesh, stored)
    state = state._replace(params=state.params | {"unet": spoken(state.params["unet"])})
    start = jax.tree.map(np.array, frozen | state.params)
    state, _ = make_step(task, optimizer, 0, decay=0.9)(state, frozen, put_batch(next(task.batch({})), mesh))
    task.export(frozen | state.params, tmp_path / "export")
    saved = sdjax.load(tmp_path / "export").params
    assert moved(start["unet"], saved["unet"]) > 0.9
    # Embeddings of words that no caption has would not move either, but all are one array.
    assert moved(start["text_encoder"], saved["text_encoder"]) == (1.0 if text == "trained" else 0.0)
    assert moved(start["vae"], saved["vae"]) == 0.0


def moved(before: dict, after: dict) -> float:
    """The part of all arrays that are not what they were."""
    before, after = flatten(before), flatten(after)
    return sum(not np.array_equal(before[name], after[name]) for name in before) / len(before)


def test_bad_configs_and_data_are_one_line(pictures, tmp_path):
    mesh = make_mesh({"data": -1})
    for change, message in {
        (
            "task",
            "text",
            "spoken",
        ): "unknown text 'spoken' in config.task.text; choose one of: frozen, prepared, trained",
        ("data", "size", 33): "data.size=33 is not a multiple of 2",
        ("task", "timesteps", "never"): "unknown timestep distribution 'never'",
        ("train", "remat", "all"): "unknown remat policy 'all' in train.remat; choose one of: blocks, none, products",
    }.items():
        config = config_of("sd1_tiny", pictures)
        section, name, value = change
        config[section][name] = value
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            make(config, mesh).init(jax.random.key(0))
    config = config_of("sd1_tiny", pictures)
    config.model.unet.variant = "sd5"
    with pytest.raises(UserError, match=r"unknown variant 'sd5' in config\.model\.unet\.variant"):
        make(config, mesh)
    data = tmp_path / "data"
    prepare(config_of("sd1_tiny", pictures, data), data)
    other = config_of("sd1_tiny", pictures, data)
    other.model.autoencoder.channels = (16, 16)
    with pytest.raises(UserError, match="was prepared with autoencoder"):
        make(other, mesh).batch({})
    with pytest.raises(UserError, match="was begun with identity"):
        prepare(other, data)
    shutil.rmtree(data)
    with pytest.raises(UserError, match="no prepared data set"):
        make(other, mesh).batch({})
