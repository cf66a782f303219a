"""ADM's classifier as a task, and images that it leads to a class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import drawn

import sdjax
from configs import classifiers, pixels
from sdjax.checkpoints.checkpoint import FORMATS, Checkpoint, Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.core.errors import UserError
from sdjax.data.images import to_uint8
from sdjax.diffusion.loss import gather, uniform_timesteps
from sdjax.diffusion.samplers import schedule_of
from sdjax.models.conditioning import apply
from sdjax.models.unet2d import UNet2DConfig
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.classifier import classify, read_classifier
from sdjax.tasks.make import make_task

MESH = {"data": -1}


@pytest.fixture(scope="module")
def classifier():
    """The config, the task, and random parameters, none of them zero."""
    config = classifiers.get_config("openmoji_tiny")
    config.model.classifier.update(channels=(32, 64), layers_per_block=1)
    task = make_task(config, make_mesh(MESH))
    return config, task, drawn(jax.eval_shape(task.init, jax.random.key(0)))


def test_the_loss_is_the_cross_entropy_of_noisy_pictures(classifier, tmp_path):
    """Beside torch's, of the logits of images that are noised by hand: to 1e-5. And a stored one says the same."""
    config, task, params = classifier
    batch = next(task.batch(params))
    key = jax.random.key(2)
    value, metrics = jax.jit(task.loss)(params, batch, key, 0)
    noise_key, time_key = jax.random.split(key)
    t = uniform_timesteps(time_key, 8, 1000)
    abar = np.asarray(gather(schedule_of(config.task.scheduler.to_dict()).alphas_cumprod, t))[:, None, None, None]
    noise = np.asarray(jax.random.normal(noise_key, (8, 16, 16, 3)))
    x = np.sqrt(abar) * (batch["image"] / 127.5 - 1.0) + np.sqrt(1.0 - abar) * noise
    task.export(params, tmp_path)
    model, read = read_classifier(tmp_path)
    answer = jax.jit(lambda x, t: apply(model, read, x, t))
    logits = np.array(answer(jnp.asarray(x, jnp.float32), t))
    wanted = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(batch["label"]).long())
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    assert float(metrics["accuracy"]) == (logits.argmax(-1) == batch["label"]).mean()
    clean = np.array(answer(jnp.asarray(batch["image"] / 127.5 - 1.0, jnp.float32), jnp.zeros_like(t)))
    np.testing.assert_allclose(classify(model, read, batch["image"]), clean, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("ddpm", "linspace"), pytest.param("ddim", "leading", marks=pytest.mark.slow)]
)
def test_a_guide_leads_images_to_their_class(sampler, schedule, classifier, tmp_path):
    """With more of it the classifier is surer; with none, images are those without a classifier.

    But for DDIM, whose direction ADM takes from the clipped image, and diffusers from the network's own.
    """
    _, task, params = classifier
    task.export(params, tmp_path / "classifier")
    model, judge = read_classifier(tmp_path / "classifier")
    config = UNet2DConfig((8,), (), (1,), out_channels=6, layers_per_block=1, groups=4)
    weights = drawn(FORMATS["unet"].shapes(config))
    weights["conv_out"] = jax.tree.map(np.zeros_like, weights["conv_out"])  # the noise stays: only the guide moves it
    scheduler = pixels.get_config("iddpm_64_tiny").task.scheduler.to_dict()
    components = {"unet": Component(config, weights, {"sample_size": 16})}
    write_checkpoint(
        tmp_path / "model", Checkpoint(components=components, scheduler=scheduler, conditioning="unconditional")
    )
    settings = {"sampler": sampler, "schedule": schedule, "steps": 6, "seed": 0}
    plain = sdjax.load(tmp_path / "model")(**settings, num_images=2)
    pipe = sdjax.load(tmp_path / "model", classifier=tmp_path / "classifier")
    labels, sure = range(2), []
    for scale in (0.0, 1.0, 4.0):
        images = pipe(class_label=list(labels), classifier_scale=scale, **settings)
        if scale == 0.0 and sampler == "ddpm":
            np.testing.assert_allclose(images, plain, atol=1e-5)
        logits = jax.nn.log_softmax(classify(model, judge, to_uint8(images)))
        sure.append(float(logits[np.arange(2), np.arange(2)].mean()))
    assert sure[0] < sure[1] < sure[2]


def test_the_loss_depends_on_the_class():
    """ADM's own embedding of a class."""
    config = pixels.get_config("adm_64_tiny")
    config.model.unet.update(channels=(32,), heads=(1,), attention_levels=(), classes=10)
    config.data.source = "openmoji"
    task = make_task(config, make_mesh(MESH))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    batch = {name: rows[:2] for name, rows in next(task.batch(params)).items()}
    loss = jax.jit(task.loss)
    values = [
        float(loss(params, {**batch, "label": (batch["label"] + i) % 10}, jax.random.key(0), 0)[0]) for i in (0, 1)
    ]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "adm_32"}, "unknown variant 'adm_32' in config.model.classifier.variant"),
        ({"size": 32}, "config.data.size=16; the classifier is made for images of 32"),
        ({"colour": 3}, "unknown size 'colour' in config.model.classifier"),
    ],
)
def test_bad_configs_are_one_line(change, message):
    config = classifiers.get_config("openmoji_tiny")
    with config.model.classifier.unlocked():
        config.model.classifier.update(change)
    with pytest.raises(UserError) as error:
        make_task(config, make_mesh(MESH))
    assert message in str(error.value)


def test_unknown_class_names_the_image():
    config = classifiers.get_config("openmoji_tiny")
    config.model.classifier.classes = 2
    with pytest.raises(Exception, match=r"has the class \d; the model has 0 to 1"):
        next(make_task(config, make_mesh(MESH)).batch({}))
