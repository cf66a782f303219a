"""Training of ControlNets beside diffusers' (examples/controlnet), from pairs on disk to a folder that it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from test_stable_diffusion import texts
from torch_reference import channels_first, channels_last, randomised, translated

import train
from configs import controlnet
from sdjax.checkpoints.controlnets import is_controlnet
from sdjax.checkpoints.layouts.diffusers import read_component, read_folder
from sdjax.checkpoints.networks import controlnet as conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, merge
from sdjax.models.conditioning import Cond, apply
from sdjax.models.controlnet import config_for, controlnet_of
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.diffusion import make_model
from sdjax.tasks.finetune import from_checkpoint
from sdjax.tasks.make import make_task
from sdjax.training.task import split_frozen

CAPTIONS = ("red heart", "a cat", "a photo of a red cat", "a dog")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Fill50k's layout: four images of noise with their hints, which are another noise."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for name in ("source", "target"):
        (folder / name).mkdir()
        for i in range(len(CAPTIONS)):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    rows = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": c} for i, c in enumerate(CAPTIONS)]
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_of(base: Path, pairs: Path, **task: Any):
    config = controlnet.get_config(str(base))
    config.data.source = f"folder:{pairs}"
    config.task.update(task)
    return config


def pixels(folder: Path, order: list[int]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in order]).astype(np.float32)


@pytest.mark.parametrize("name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2_v", "sdxl"))])
def test_loss_and_gradients_are_those_of_diffusers(name, folders, pairs, tmp_path):
    """From pairs on disk on: the loss to 1e-4, every gradient to 1e-3 of its largest value."""
    base = folders(name)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False).eval()
    sizes = config_for(conversion_of_unet(base), zoo.FACTOR)
    net = randomised(diffusers.ControlNetModel.from_config(conversion.to_diffusers_config(sizes))).train()
    net.save_pretrained(tmp_path / "net")
    config = config_of(base, pairs, controlnet=str(tmp_path / "net"), timestep_range=(400, 1000))
    task, mesh = make_task(config, make_mesh(config.mesh)), make_mesh(config.mesh)
    params = task.pretrained(sharded_put(mesh))
    batch, key = next(task.batch(params)), jax.random.key(1)

    frozen, learnt = split_frozen(task, params)
    assert set(learnt) == {"controlnet"}
    run = jax.jit(jax.value_and_grad(lambda learnt: task.loss(merge(frozen, learnt), batch, key, 0)[0]))
    value, gradients = run(learnt)

    order = [
        next(i for i in range(4) if np.array_equal(pixels(pairs / "target", [i])[0], image)) for image in batch["image"]
    ]
    assert sorted(order) == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch["conditioning_image"], pixels(pairs / "source", order))
    latent_key, rest, drop_key = jax.random.split(key, 3)
    noise_key, time_key = jax.random.split(rest)
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae").eval()
    with torch.no_grad():
        found = vae.encode(channels_first(pixels(pairs / "target", order) / 127.5 - 1.0)).latent_dist
    draw = channels_first(np.asarray(jax.random.normal(latent_key, channels_last(found.mean).shape)))
    x0 = (found.mean + found.std * draw) * vae.config.scaling_factor
    noise = channels_first(np.asarray(jax.random.normal(noise_key, channels_last(x0).shape)))
    t = torch.tensor(np.array(400 + jax.random.randint(time_key, (4,), 0, 600)))
    dropped = np.asarray(jax.random.bernoulli(drop_key, 0.5, (4,)))
    assert 0 < dropped.sum() < 4
    said = texts(base, ["" if drop and name != "sdxl" else CAPTIONS[i] for i, drop in zip(order, dropped, strict=True)])
    if name == "sdxl":
        said = {k: v * torch.tensor(~dropped).reshape(-1, *[1] * (v.ndim - 1)) for k, v in said.items()}
        said["added"] = {"text_embeds": said.pop("pooled"), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 4)}
    schedule = diffusers.DDPMScheduler.from_pretrained(base / "scheduler")
    x, hint = schedule.add_noise(x0, noise, t), channels_first(pixels(pairs / "source", order) / 255.0)
    call = {"encoder_hidden_states": said["context"], "added_cond_kwargs": said.get("added"), "return_dict": False}
    down, mid = net(x, t, controlnet_cond=hint, **call)
    out = unet(x, t, down_block_additional_residuals=down, mid_block_additional_residual=mid, **call)[0]
    target = schedule.get_velocity(x0, noise, t) if name == "sd2_v" else noise
    loss = torch.nn.functional.mse_loss(out, target)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.grad)
    theirs = flatten(translated(net, conversion.table(sizes), conversion.shapes(sizes)))
    for path, gradient in flatten(gradients["controlnet"]).items():
        largest = np.abs(theirs[path]).max()
        np.testing.assert_allclose(gradient, theirs[path], atol=1e-3 * largest + 1e-7, rtol=0, err_msg=path)


def conversion_of_unet(base: Path) -> Any:
    return read_component(base / "unet", "unet").config


def test_a_fresh_net_changes_no_loss(folders, pairs):
    """Zero convolutions: the loss is the base's own to the bit, whatever the hint."""
    config = config_of(folders("sd1"), pairs)
    config.model.controlnet.zero_hint = False
    task = make_task(config, make_mesh(config.mesh))
    params = task.pretrained(sharded_put(make_mesh(config.mesh)))
    batch, run = next(task.batch(params)), jax.jit(task.loss)
    other = {**batch, "conditioning_image": 255 - batch["conditioning_image"]}
    values = [float(run(params, rows, jax.random.key(0), 0)[0]) for rows in (batch, other)]
    assert values[0] == values[1]
    changed = jax.tree.map(lambda leaf: leaf + 0.01, params["controlnet"])
    values = [float(run({**params, "controlnet": changed}, rows, jax.random.key(0), 0)[0]) for rows in (batch, other)]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ((), "--controlnet {workdir}"),
        (("unet/conv_out",), "--checkpoint {workdir} --controlnet {workdir}"),
        (("text_encoder/*",), "--checkpoint {workdir} --controlnet {workdir}"),
    ],
)
def test_the_command_at_the_end_names_all_that_learned(more, flags, folders, pairs, tmp_path):
    """Beside the ControlNet what it was trained with, where that is no longer the base."""
    config = config_of(folders("sd1"), pairs)
    config.train.trainable = ("controlnet", *more)
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh)
    assert task.use == f"python sample.py --config {{config}} {flags} --prompt ... --control_image ..."
    task.export(merge(task.init(jax.random.key(0)), task.pretrained(sharded_put(mesh))), tmp_path / "export")
    assert is_controlnet(tmp_path / "export" / ("controlnet" if more else ""))
    assert (tmp_path / "export" / "unet").exists() == bool(more)


@pytest.mark.slow
@pytest.mark.parametrize("unlocked", [False, True])
def test_a_trained_net_is_a_folder_that_diffusers_loads(unlocked, folders, pairs, tmp_path):
    """Two halves of a run are the whole to the bit; the base stays as it is, but for an unlocked decoder."""
    decoder = ("unet/up_blocks*", "unet/conv_norm_out", "unet/conv_out") if unlocked else ()
    made = {}
    for name, stops in {"whole": (4,), "halves": (2, 4)}.items():
        for steps in stops:
            config = config_of(folders("sd1"), pairs)
            config.optim.update(learning_rate=1e-3)
            config.train.update(steps=steps, checkpoint_every=2, sample_every=4, log_every=1)
            config.train.trainable = ("controlnet", *decoder)
            config.sample.update(count=2, columns=2, steps=2)
            made[name] = train.train_and_evaluate(config, tmp_path / name)
    before = read_folder(folders("sd1"))
    net = made["whole"] / "controlnet" if unlocked else made["whole"]
    ours = read_component(net, "controlnet")
    theirs = diffusers.ControlNetModel.from_pretrained(net)
    again = read_component(made["halves"] / net.relative_to(made["whole"]), "controlnet")
    jax.tree.map(np.testing.assert_array_equal, ours.params, again.params)
    start = flatten(before.components["unet"].params)
    for path, leaf in flatten(ours.params).items():
        if path in start and path.endswith("kernel"):
            assert not np.array_equal(leaf, start[path]), path
    if unlocked:
        after = flatten(read_folder(made["whole"]).components["unet"].params)
        assert {path.split("_")[0] for path in after if not np.array_equal(after[path], start[path])} == {"up", "conv"}
        assert np.array_equal(after["conv_in/kernel"], start["conv_in/kernel"])
    x, context = (
        np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32),
        np.ones((2, 12, 64), np.float32),
    )
    hint = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
    t = np.array([900.0, 20.0], np.float32)
    found = jax.jit(lambda p: apply(controlnet_of(ours.config), p, x, t, Cond(context), hint))(ours.params)
    with torch.no_grad():
        down, mid = theirs(
            channels_first(x), torch.tensor(t), torch.tensor(context), channels_first(hint), return_dict=False
        )
    for mine, expected in zip(found, [*down, mid], strict=True):
        assert np.abs(mine).max() > 1e-4
        np.testing.assert_allclose(mine, channels_last(expected), atol=1e-5)
    picture = np.asarray(Image.open(next((tmp_path / "whole" / "samples").glob("*.png"))))
    assert picture.shape == (3 * 16, 2 * 16, 3)  # images, hints, samples
    shown = picture[16:32, :16]
    assert any(np.array_equal(shown, pixels(pairs / "source", [i])[0]) for i in range(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.controlnet": {"zero": 1}}, "config.model.controlnet: "),
        ({"data.control_from": "cany"}, "unknown control_from 'cany'"),
        ({"task.timestep_range": (400, 4000)}, "config.task.timestep_range=(400, 4000): choose two of 0 to 1000"),
        ({"task.latents": "prepared"}, "choose 'cached' or 'encoded'"),
    ],
)
def test_faults_are_said(change, message, folders, pairs):
    config = config_of(folders("sd1"), pairs).unlock()
    for key, value in change.items():
        section, name = key.split(".")
        config[section][name] = value
    with pytest.raises(UserError) as error:
        make_task(config, make_mesh(config.mesh))
    assert message in str(error.value)


def test_data_without_hints_is_refused(folders, pairs, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    Image.open(pairs / "target" / "0.png").save(tmp_path / "0.png")
    config = config_of(folders("sd1"), tmp_path)
    task = make_task(config, make_mesh(config.mesh))
    with pytest.raises(UserError, match="line 1 has no conditioning_image"):
        task.identity()
    config.data.control_from = "grey"
    make_task(config, make_mesh(config.mesh)).identity()
    condition = make_model(from_checkpoint(config))[1]
    assert [type(change).__name__ for change in condition.transforms] == ["MakeHint"]
