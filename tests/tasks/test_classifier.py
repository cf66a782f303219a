"""ADM's classifier as a task, and pictures drawn to a class by it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sdjax.tasks.noisy_classifier import read_classifier
from sdjax.tasks.pixels import Guide, draw
from torch_reference import drawn

from configs import classifiers, pixels
from sdjax.core.errors import UserError
from sdjax.core.prng import image_keys
from sdjax.diffusion.loss import gather, uniform_timesteps
from sdjax.diffusion.samplers import SamplerOptions, make_table, schedule_of
from sdjax.models.conditioning import apply
from sdjax.models.unet2d import UNet2D, UNet2DConfig
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.classifier import classify
from sdjax.tasks.make import make_task

MESH = {"data": -1}


@pytest.fixture(scope="module")
def classifier():
    """The config, the task, and random parameters, none of them zero."""
    config = classifiers.get_config("openmoji_tiny")
    task = make_task(config, make_mesh(MESH))
    return config, task, drawn(jax.eval_shape(task.init, jax.random.key(0)))


def test_the_loss_is_the_cross_entropy_of_noisy_pictures(classifier, tmp_path):
    """Beside torch's, of the logits of pictures that are noised by hand: to 1e-5. And a stored one says the same."""
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


@pytest.mark.parametrize(("sampler", "spacing"), [("ddpm", "linspace"), ("ddim", "leading")])
def test_a_guide_draws_pictures_to_their_class(sampler, spacing, classifier, tmp_path):
    """With more of it the classifier is surer; without any, pictures are those of no guide.

    But for DDIM, whose direction ADM takes from the clipped picture, and diffusers from the network's own.
    """
    _, task, params = classifier
    task.export(params, tmp_path)
    model, judge = read_classifier(tmp_path)
    unet = UNet2D(UNet2DConfig((8,), (), (1,), out_channels=6, layers_per_block=1, groups=4))
    x = jnp.zeros((1, 16, 16, 3))
    weights = drawn(jax.eval_shape(unet.init, jax.random.key(0), x, jnp.zeros(1))["params"])
    weights["conv_out"] = jax.tree.map(np.zeros_like, weights["conv_out"])  # the noise stays: only the guide moves it
    scheduler = pixels.get_config("iddpm_64_tiny").task.scheduler.to_dict()
    options = SamplerOptions.from_scheduler_config(scheduler, sampler)
    table = make_table(sampler, schedule_of(scheduler), 8, options, spacing=spacing)
    keys, labels = image_keys(0, jnp.arange(4)), np.arange(4)
    plain = draw(unet, weights, table, keys, 16, "epsilon")
    sure = []
    for scale in (0.0, 1.0, 4.0):
        images = np.asarray(draw(unet, weights, table, keys, 16, "epsilon", labels, Guide(model, judge, scale)))
        if scale == 0.0 and sampler == "ddpm":
            np.testing.assert_allclose(images, plain, atol=1e-5)
        logits = jax.nn.log_softmax(classify(model, judge, (images * 255).round().astype(np.uint8)))
        sure.append(float(logits[np.arange(4), labels].mean()))
    assert sure[0] < sure[1] < sure[2]


def test_a_unet_of_classes_draws_another_picture_for_another_class():
    config = pixels.get_config("adm_64_tiny")
    with config.model.unet.unlocked(), config.model.unet.ignore_type():
        config.model.unet.classes = 10
    config.data.source = "openmoji"
    task = make_task(config, make_mesh(MESH))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    batch = next(task.batch(params))
    assert batch["label"].shape == (8,)
    loss = jax.jit(task.loss)
    values = [
        float(loss(params, {**batch, "label": (batch["label"] + i) % 10}, jax.random.key(0), 0)[0]) for i in (0, 1)
    ]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "adm_32"}, "unknown variant 'adm_32' in config.model.classifier.variant"),
        ({"size": 32}, "config.data.size=16; the classifier is made for pictures of 32"),
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


def test_a_class_that_the_model_does_not_know_names_the_picture():
    config = classifiers.get_config("openmoji_tiny")
    config.model.classifier.classes = 2
    with pytest.raises(Exception, match=r"has the class \d; the model has 0 to 1"):
        next(make_task(config, make_mesh(MESH)).batch({}))
