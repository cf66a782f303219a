"""Diffusion of pixels: a run that diffusers' DDPMPipeline loads, and the loss beside its parts."""

from __future__ import annotations

import diffusers
import jax
import numpy as np
import pytest
import torch
from sdjax.tasks.pixels import make

import train
from configs import pixels as configs
from sdjax.convert.folder import read_component
from sdjax.core.errors import UserError
from sdjax.models.unet2d import UNet2D
from sdjax.parallel.mesh import make_mesh


def config_of(pictures, name: str = "iddpm_64_tiny"):
    config = configs.get_config(name)
    config.data.source = f"pictures:{pictures}"
    return config


def test_a_run_leaves_a_pipeline_of_diffusers(pictures, tmp_path):
    """Its UNet answers as the trained one, to 1e-4; its scheduler steps with the learned variance."""
    config = config_of(pictures)
    folder = train.train_and_evaluate(config, tmp_path / "run")
    pipe = diffusers.DDPMPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.unet.config.resnet_time_scale_shift == "scale_shift"
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = pipe.unet(x, torch.tensor([3, 900])).sample
        stepped = pipe.scheduler.step(output, 900, x).prev_sample
    assert output.shape == (2, 6, 16, 16)
    assert stepped.shape == x.shape
    assert torch.isfinite(stepped).all()
    component = read_component(folder / "unet", "unet")
    given = np.moveaxis(x.numpy(), 1, -1)
    found = UNet2D(component.config).apply({"params": component.params}, given, np.array([3.0, 900.0], np.float32))
    np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1), output, atol=1e-4)


def test_the_hybrid_loss_trains_means_and_variances(pictures):
    """At a fresh network the simple part is the noise's square, 1; the bound's gradient reaches the variance alone."""
    config = config_of(pictures)
    task = make(config, make_mesh({"data": -1}))
    params = jax.jit(task.init)(jax.random.key(0))
    batch = next(task.batch(params))
    (value, _), gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, jax.random.key(1), 0)
    assert 0.9 < float(value) < 1.2
    kernel = np.asarray(gradient["unet"]["conv_out"]["bias"])
    assert (np.abs(kernel) > 0).all()
    with config.model.unet.unlocked():
        config.model.unet.out_channels = 3
    config.task.scheduler.variance_type = "fixed_small"
    plain = make(config, make_mesh({"data": -1}))
    fresh = jax.jit(plain.init)(jax.random.key(0))
    # The same draws, so the difference is lambda T times the bound of one timestep.
    simple, _ = jax.jit(plain.loss)(fresh, batch, jax.random.key(1), 0)
    assert 0.0 < float(value - simple) < 0.2


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "size", 17, "data.size=17 is not a multiple of 2"),
        ("unet", "in_channels", 4, "has 4 channels in and 6 out; pictures have 3 in"),
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
