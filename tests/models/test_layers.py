from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zoo
from diffusers import LatentConsistencyModelPipeline
from torch_reference import channels_first

from sdjax.core.tree import flatten
from sdjax.models.autoencoder import autoencoder_of
from sdjax.models.layers import Conv, GroupNorm, guidance_embedding, timestep_embedding
from sdjax.models.unet import UNet
from sdjax.ops.doubling import convolve_doubled


def test_sinusoids_have_the_published_values():
    """huggingface/diffusers tests/models/test_layers_utils.py, the Stable Diffusion case: cosines first, shift 0."""
    table = timestep_embedding(jnp.arange(128.0), 64)
    golden = [[0.3019, 0.2280, 0.1716], [0.3146, 0.2377, 0.1790], [0.3272, 0.2474, 0.1864]]
    np.testing.assert_allclose(table[23:26, 47:50], golden, atol=1e-3)
    np.testing.assert_array_equal(table[0], [1.0] * 32 + [0.0] * 32)


def test_sinusoids_of_fractional_times_are_the_formula():
    t = np.array([0.25, 500.5, 999.0])
    angles = t[:, None] * 10000.0 ** (-np.arange(16) / 16)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 32), expected, atol=1e-4)


@pytest.mark.parametrize("width", [256, 7])
def test_guidance_sinusoids_are_those_of_diffusers(width: int):
    """To 2e-3: angles reach 14,000, where one bit of a frequency moves a sine by 1e-3, and torch's exp differs by a bit
    between processors."""
    scales = np.array([0.0, 0.123, 1.0, 7.5, 14.0], np.float32)
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.from_numpy(scales), width)
    found = jax.jit(guidance_embedding, static_argnums=1)(scales, width)
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)
    assert found[2, 0] == pytest.approx(np.sin(1000.0), abs=1e-5)


def test_group_norm_is_float32():
    """A large mean over a small deviation is lost in bfloat16's eight bits unless the statistics are float32."""
    x = jnp.asarray(np.random.default_rng(0).normal(100.0, 4.0, (2, 6, 6, 8)), jnp.bfloat16)
    norm = GroupNorm(groups=2, dtype=jnp.bfloat16)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    wide = np.asarray(x, np.float64).reshape(2, 36, 2, 4)
    mean, var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    expected = ((wide - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02)


@pytest.mark.parametrize("size", [(7, 5), (8, 8), (1, 3)])
def test_doubling_convolution_matches_torch(size: tuple[int, int]):
    """Nearest-neighbour interpolation and a 3x3 convolution: to 1e-5, its gradients to 1e-5 of their largest value."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 6)).astype(np.float32)
    weight = rng.standard_normal((2, 2 * size[0], 2 * size[1], 4)).astype(np.float32)
    module = Conv(4, convolve=convolve_doubled)
    params = module.init(jax.random.key(0), x)

    def weighed(params, x):
        return (module.apply(params, x) * weight).sum()

    value, gradients = jax.value_and_grad(weighed, (0, 1))(params, x)
    conv = torch.nn.Conv2d(6, 4, 3, padding=1)
    conv.weight.data = torch.from_numpy(np.array(params["params"]["kernel"]).transpose(3, 2, 0, 1).copy())
    conv.bias.data = torch.zeros(4)
    picture = channels_first(x).requires_grad_()
    theirs = (conv(torch.nn.functional.interpolate(picture, scale_factor=2.0)) * channels_first(weight)).sum()
    theirs.backward()
    assert float(value) == pytest.approx(float(theirs.detach()), rel=1e-4)
    wanted = {
        "kernel": conv.weight.grad.numpy().transpose(2, 3, 1, 0),
        "bias": conv.bias.grad.numpy(),
        "x": np.moveaxis(picture.grad.numpy(), 1, -1),
    }
    found = {**gradients[0]["params"], "x": gradients[1]}
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_interceptors_see_every_kernel(name: str):
    """Each kernel is that of a Dense or a Conv of Flax, called once: an adapter that intercepts them misses none."""
    config = {"unet": zoo.UNETS["sdxl"], "vae": zoo.VAES["sd"]}[name]
    module, inputs = (
        (UNet(config), config.example_inputs())
        if name == "unet"
        else (autoencoder_of(config), (jnp.zeros((1, 8, 8, 3)), jax.random.key(0)))
    )
    seen: list[str] = []

    def watch(call, args, kwargs, context):
        if type(context.module) in (nn.Dense, nn.Conv) and context.method_name == "__call__":
            seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    kernels = [key.removesuffix("/kernel") for key in flatten(shapes) if key.endswith("/kernel")]
    assert len(kernels) > 20
    assert sorted(seen) == sorted(kernels)
