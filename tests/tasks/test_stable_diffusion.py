"""Training of Stable Diffusion beside PyTorch: what is prepared, what the loss is, what is left at the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import diffusers
import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image
from torch_reference import drawn

import sdjax
import train
from configs import stable_diffusion_training as configs
from sdjax.checkpoints.checkpoint import FORMATS
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.core.errors import UserError
from sdjax.core.tree import Params, flatten, merge
from sdjax.data.prepared.dataset import PreparedSource
from sdjax.data.transforms.buckets import cover, resize_crop
from sdjax.parallel.batches import put_batch
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.prepare import prepare
from sdjax.tasks.diffusion import checkpoint_of, drop_condition, make, make_model
from sdjax.tasks.make import make_task
from sdjax.training.step import TrainState, init_state, make_step
from sdjax.training.task import Task, split_frozen

TINY = tuple(configs.TINY)


def config_of(name: str, pictures: Path, prepared: Path | str = "", **data: object) -> ConfigDict:
    config = configs.get_config(name)
    config.data.source = f"folder:{pictures}"
    config.data.prepared = str(prepared)
    config.data.update(data)
    return config


class Case(NamedTuple):
    """A tiny config with prepared data and random networks.

    Attributes:
        config: half of whose captions are dropped.
        task, params: with every parameter random.
        theirs: folder of the same networks, for PyTorch.
        source: the prepared data.
    """

    config: ConfigDict
    task: Task
    params: Params
    theirs: Path
    source: PreparedSource


@pytest.fixture(scope="module", params=TINY)
def case(request, pictures, tmp_path_factory):
    folder, mesh = tmp_path_factory.mktemp(request.param), make_mesh({"data": -1})
    config = config_of(request.param, pictures, folder / "data", crop="centre")
    theirs = written(config, folder / "theirs")
    config.task.update(components=str(theirs), initial=str(theirs), dropout=0.5)
    prepare(config, folder / "data", batch_size=8)
    task = make(config, mesh)
    return Case(config, task, task.pretrained(sharded_put(mesh)), theirs, PreparedSource(folder / "data"))


def written(config: ConfigDict, folder: Path) -> Path:
    """A folder of a config's networks, every parameter random: zeros would hide mistakes."""
    model, condition = make_model(config)
    shapes = {name: FORMATS[name].shapes(sizes) for name, sizes in model.configs().items()}
    write_checkpoint(folder, checkpoint_of(config, model, condition, drawn(shapes)))
    return folder


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
    """Moments and embeddings of every image, stored in half precision: 2e-3 of their largest value."""
    config, theirs, source = case.config, case.theirs, case.source
    assert len(source) == 24
    vae = diffusers.AutoencoderKL.from_pretrained(theirs / "vae").eval()
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
        expected |= {k: v[0] for k, v in texts(theirs, [f"an image of the number {index}"]).items()}
        for key, value in expected.items():
            np.testing.assert_allclose(row[key], value, atol=2e-3 * float(np.abs(value).max()), err_msg=key)
        if "sizes" in row:
            assert row["sizes"].tolist() == [*picture.shape[:2], top, left, *target]
    blank = texts(theirs, [""])
    for key, value in source.constants.items():
        expected = np.zeros_like(value) if "pooled" in source.constants else blank[key][0]
        np.testing.assert_allclose(value, expected, atol=2e-3 * 4, err_msg=key)


def reference_loss(config: ConfigDict, folder: Path, batch: dict, blank: dict, key: jax.Array) -> float:
    """The loss of diffusers' examples/text_to_image train scripts, from the same random draws."""
    latent_key, rest, drop_key = jax.random.split(key, 3)
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
    dropped = np.asarray(jax.random.bernoulli(drop_key, config.task.dropout, (len(x0),)))
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
    batch, loss = next(case.task.batch(case.params)), jax.jit(case.task.loss)
    for number in range(2):
        key = jax.random.key(number)
        value, _ = loss(case.params, batch, key, 0)
        expected = reference_loss(case.config, case.theirs, batch, dict(case.source.constants), key)
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_tokens_give_the_prepared_embeddings(case):
    """The same condition of captions and of dropped ones, but for the half precision of what is stored."""
    config = case.config.copy_and_resolve_references()
    config.task.text = "tokens"
    model, condition = make_model(config)
    rows = [case.source[i] for i in range(4)]
    captions = [f"an image of the number {i}" for i in range(4)]
    tokens = np.stack([condition.loaded[name].encode(captions) for name in condition.tokenizers], axis=1)
    stored = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "moments"}
    told = {"tokens": tokens} | {name: stored[name] for name in ("sizes",) if name in stored}
    conds = []
    for made, batch in ((make_model(case.config), stored), ((model, condition), told)):
        columns = drop_condition(made[0].conditioner, made[1].columns(batch), jax.random.key(0), 0.5)
        assert 0 < np.sum(columns["keep"]) < 4
        conds.append(made[0].conditioner.cond(case.params, columns))
    for wanted, found in zip(jax.tree.leaves(conds[0]), jax.tree.leaves(conds[1]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-3 * float(np.abs(wanted).max()))


@pytest.mark.slow
def test_training_run_exports_for_diffusers(pictures, tmp_path, monkeypatch):
    """Prepared in buckets, trained with one compilation for each, previewed, exported."""
    config = config_of("sdxl_tiny", pictures, tmp_path / "data")
    config.model.unet.update(channels=(32,), depths=(1,), heads=(2,))  # each bucket is a program
    theirs = written(config, tmp_path / "before")
    config.task.update(components=str(theirs), initial=str(theirs))
    prepare(config, tmp_path / "data", batch_size=8)
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
    ours = np.asarray(sdjax.load(folder).params["unet"]["conv_in"]["kernel"])
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    assert theirs.unet.config.sample_size == 16
    np.testing.assert_array_equal(theirs.unet.conv_in.weight.detach().permute(2, 3, 1, 0), ours)


@pytest.fixture
def few(pictures):
    """A config of the smallest UNet, which reads tokens, and a batch for it."""
    config = config_of("sd1_tiny", pictures)
    config.task.update(text="tokens", export_dtype="float32")
    config.model.unet.update(channels=(32,), depths=(1,), heads=(2,))
    config.model.autoencoder.channels = (8,)
    config.data.size = 8
    rng = np.random.default_rng(0)
    spec = make_task(config, make_mesh({"data": -1})).batch_spec(2)
    moments = rng.standard_normal(spec["moments"].shape).astype(np.float16)
    return config, {"moments": moments, "tokens": rng.integers(0, 400, spec["tokens"].shape).astype(np.int32)}


def trained(config: ConfigDict, batch: dict, folder: Path, steps: int) -> tuple[Params, Params, TrainState]:
    """Parameters before some steps, those of the export after them, and the state."""
    mesh, optimizer = make_mesh({"data": -1}), optax.adam(1e-3)
    config.task.update(components=str(written(config, folder / "before")), initial=str(folder / "before"))
    task = make_task(config, mesh)
    frozen, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
    start = jax.tree.map(np.array, merge(frozen, initial))
    state, step = init_state(task, optimizer, 0, mesh, initial), make_step(task, optimizer, 0, decay=0.9)
    for _ in range(steps):
        state, _ = step(state, frozen, put_batch(batch, mesh))
    task.export(merge(frozen, state.params), folder / "after")
    return start, dict(sdjax.load(folder / "after").params), state


def changed(before: Params, after: Params) -> set[str]:
    """Names of arrays that are not what they were, to the bit."""
    before, after = flatten(before), flatten(after)
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_only_named_parameters_are_trained(few, tmp_path):
    """Two steps, of a part of the UNet and of a text encoder: all others keep every bit, and neither the optimiser nor
    the average holds them."""
    config, batch = few
    config.train.trainable = ("unet/*to_k*", "unet/*to_v*", "text_encoder")
    before, after, state = trained(config, batch, tmp_path, 2)
    named = {name for name in flatten(before) if name.startswith("unet/") and ("to_k" in name or "to_v" in name)}
    assert len(named) > 3
    named |= {name for name in flatten(before) if name.startswith("text_encoder/")}
    assert changed(before, after) == named
    for tree in (state.params, state.ema, state.opt_state[0].mu, state.opt_state[0].nu):
        assert set(flatten(tree)) == named


@pytest.mark.parametrize(
    ("trainable", "text", "message"),
    [
        (("unet/*to_q2*",), "tokens", "config.train.trainable: 'unet/*to_q2*' matches no parameter; components are "),
        (("unet", "text_encoder"), "prepared", "names a text encoder, but config.task.text='prepared' freezes them"),
    ],
)
def test_bad_trainable_names_are_one_line(few, trainable, text, message):
    config, _ = few
    config.train.trainable, config.task.text = trainable, text
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        make_task(config, make_mesh({"data": -1}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("task", "text", "spoken", "unknown text 'spoken' in config.task.text; choose one of: prepared, tokens"),
        ("task", "latents", "encoded", "config.task.latents='encoded' does not fit config.task.conditioning='text'"),
        ("task", "timesteps", "never", "unknown timestep distribution 'never'"),
        ("data", "size", 33, "config.data.size=33 is not a multiple of 2"),
        ("train", "remat", "all", "unknown remat policy 'all' in train.remat; choose one of: blocks, none, products"),
        ("unet", "variant", "sd5", "unknown variant 'sd5' in config.model.unet.variant"),
    ],
)
def test_bad_configs_are_one_line(section, name, value, message, pictures):
    config = config_of("sd1_tiny", pictures)
    (config.model.unet if section == "unet" else config[section])[name] = value
    with pytest.raises(UserError) as error:
        make(config, make_mesh({"data": -1}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_prepared_data_of_another_config_are_refused(pictures, tmp_path):
    data, mesh = tmp_path / "data", make_mesh({"data": -1})
    config = config_of("sd1_tiny", pictures, data)
    config.task.components = str(written(config, tmp_path / "components"))
    prepare(config, data, batch_size=8)
    with pytest.raises(UserError, match="was begun with identity"):
        prepare(config_of("sd1_tiny", pictures, data, crop="centre"), data)
    other = config.copy_and_resolve_references()
    other.model.autoencoder.channels = (16, 16)
    with pytest.raises(UserError, match="was prepared with autoencoder"):
        make(other, mesh).batch({})
    shutil.rmtree(data)
    with pytest.raises(UserError, match="no prepared data set"):
        make(config, mesh).batch({})
