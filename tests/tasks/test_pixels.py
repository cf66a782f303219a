"""Diffusion of pixels: a run that diffusers' DDPMPipeline loads, and the loss beside its parts."""

from __future__ import annotations

import diffusers
import diffusers_pixels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import drawn

import sdjax
import train
from configs import pixels as configs
from sdjax.core.errors import UserError
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.diffusion import make
from sdjax.tasks.objective import objective_of


def config_of(pictures, name: str = "iddpm_64_tiny"):
    config = configs.get_config(name)
    config.data.source = f"pictures:{pictures}"
    return config


def test_a_run_leaves_a_pipeline_of_diffusers(pictures, tmp_path):
    """DDPMPipeline, with the learned variance in every step: the same images by the same seed, to 1e-3."""
    config = config_of(pictures)
    config.model.unet.update(channels=(32,), heads=(1,), attention_levels=(0,))
    config.train.update(steps=2, checkpoint_every=2)
    config.sample.update(count=2, steps=8)
    folder = train.train_and_evaluate(config, tmp_path / "run")
    wanted = diffusers_pixels.ddpm_images(folder, seed=4)
    assert diffusers.DDPMScheduler.from_pretrained(folder / "scheduler").config.variance_type == "learned_range"
    assert wanted.std() > 0.05
    found = sdjax.load(tmp_path / "run")(num_images=2, seed=4, rng="torch", steps=8)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("scheduler", [{}, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}])
def test_pipelines_of_diffusers_sample_the_same(scheduler, tmp_path):
    """DDPMPipeline as it wrote itself, with the same seed: to 1e-3."""
    diffusers_pixels.write_ddpm(tmp_path, **scheduler)
    wanted = diffusers_pixels.ddpm_images(tmp_path, seed=4)
    assert wanted.std() > 0.05
    found = sdjax.load(tmp_path)(num_images=2, seed=4, rng="torch", steps=8)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_hybrid_loss_trains_means_and_variances(pictures):
    """At a fresh network the simple part is the noise's square, 1; the bound's gradient reaches the variance alone."""
    config = config_of(pictures)
    config.model.unet.update(channels=(32,), heads=(1,), attention_levels=())
    task = make(config, make_mesh({"data": -1}))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    params["unet"]["conv_out"] = jax.tree.map(np.zeros_like, params["unet"]["conv_out"])
    batch = next(task.batch(params))
    (value, _), gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, jax.random.key(1), 0)
    assert 0.9 < float(value) < 1.2
    kernel = np.asarray(gradient["unet"]["conv_out"]["bias"])
    assert (np.abs(kernel) > 0).all()
    # The same draws, so the difference is lambda T times the bound of one timestep.
    noise_key = jax.random.split(jax.random.key(1), 3)[1]
    simple = jnp.square(objective_of(config.task).noised(jnp.zeros((8, 16, 16, 3)), noise_key).noise).mean()
    assert 0.0 < float(value - simple) < 0.2


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "size", 17, "data.size=17 is not a multiple of 2"),
        ("unet", "in_channels", 4, "takes 3 channels and gives 3 or 6"),
        ("unet", "out_channels", 3, "6 channels go with 'learned_range', 3 with a fixed one"),
        ("unet", "variant", "adm_65", "unknown variant 'adm_65' in config.model.unet.variant"),
    ],
)
def test_bad_configs_are_one_line(pictures, section, key, value, message):
    config = config_of(pictures)
    place = config.model.unet if section == "unet" else config[section]
    with place.unlocked(), place.ignore_type():
        place[key] = value
    with pytest.raises(UserError) as error:
        make(config, make_mesh({"data": -1}))
    assert message in str(error.value)
