"""T2I-Adapters beside those of diffusers, and their features in its UNets."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import torch
import zoo
from diffusers import T2IAdapter as TorchAdapter
from diffusers import UNet2DConditionModel
from torch_reference import channels_first, channels_last, randomised, translated

from sdjax.checkpoints.mapping import stored_shapes
from sdjax.checkpoints.networks import t2i_adapter as conversion
from sdjax.checkpoints.networks import unet as unet_conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import size
from sdjax.models.conditioning import Cond
from sdjax.models.t2i_adapter import VARIANTS, T2IAdapter, T2IAdapterConfig
from sdjax.models.unet import UNet

# TencentARC's released files.
TOTALS = {"full": 77_369_280, "full_grey": 77_000_640, "full_xl": 79_028_160, "light": 18_689_200}
TENSORS = {"full": 38, "full_grey": 38, "full_xl": 38, "light": 80}
TINY = {
    "full": T2IAdapterConfig(channels=(8, 16, 16), in_channels=1),
    "full_xl": T2IAdapterConfig("full_adapter_xl", channels=(8, 12, 16, 16), factor=16),
    "light": T2IAdapterConfig("light_adapter", channels=(8, 16), layers=3),
}
RNG = np.random.default_rng(6)


def test_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS
    stored = {name: stored_shapes(conversion.TABLE, conversion.shapes(config)) for name, config in VARIANTS.items()}
    assert {name: len(keys) for name, keys in stored.items()} == TENSORS
    assert {name: conversion.config_of(keys, name) for name, keys in stored.items()} == VARIANTS


@pytest.mark.parametrize("name", TINY)
def test_features_agree_with_diffusers_to_1e_4(name: str):
    """Of a hint whose features have odd sides."""
    config = TINY[name]
    theirs = randomised(
        TorchAdapter(**{k: v for k, v in conversion.to_diffusers_config(config).items() if k[0] != "_"})
    )
    assert conversion.from_diffusers_config(theirs.config) == config
    params = translated(theirs, conversion.TABLE, conversion.shapes(config))
    hint = RNG.random((2, 5 * config.factor, 3 * config.factor, config.in_channels)).astype("f")
    with torch.no_grad():
        expected = theirs(channels_first(hint))
    found = jax.jit(T2IAdapter(config).apply)({"params": params}, hint)
    assert [x.shape[-1] for x in found] == list(config.features)
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, channels_last(other), atol=1e-4, rtol=0)


# In TencentARC's names residual blocks are one flat list; the rules are those of its `Adapter` and `Adapter_light`.
ORIGINAL = {
    "full": [
        (r"^adapter\.", ""),
        (r"^body\.(\d+)\.in_conv", lambda m: f"body.{2 * int(m[1])}.in_conv"),
        (r"^body\.(\d+)\.resnets\.(\d+)", lambda m: f"body.{2 * int(m[1]) + int(m[2])}"),
    ],
    "light": [(r"^adapter\.", ""), (r"\.resnets\.", ".body.")],
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_names_are_read(name: str):
    stored = stored_shapes(conversion.TABLE, conversion.shapes(VARIANTS[name]))
    original = {}
    for key, shape in stored.items():
        for pattern, new in ORIGINAL[name]:
            key = re.sub(pattern, new, key)
        original[key] = shape
    assert len(original) == len(stored)
    assert "body.2.in_conv.weight" in original
    assert conversion.diffusers_names(original) == stored
    with pytest.raises(UserError, match=r"x is no T2I-Adapter: it holds no adapter.conv_in.weight"):
        conversion.config_of({"adapter.y": ()}, "x")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_features_land_where_diffusers_adds_them(name: str):
    """Both UNets to 1e-4: a level without transformers takes them after its downsampler, XL's middle the last ones."""
    sizes = zoo.UNETS[name]
    theirs = randomised(UNet2DConditionModel(**unet_conversion.to_diffusers_config(sizes)))
    params = translated(theirs, unet_conversion.table(sizes), unet_conversion.shapes(sizes))
    shapes = {"sd1": [(8, 64), (4, 128)], "sdxl": [(4, 64), (4, 64), (2, 128), (2, 128)]}[name]
    features = [RNG.standard_normal((2, side, side, width)).astype("f") for side, width in shapes]
    x, t = RNG.standard_normal((2, 8, 8, 4)).astype("f"), np.float32([981.0, 3.0])
    context = RNG.standard_normal((2, 7, sizes.context_dim)).astype("f")
    added, vector = {}, None
    if sizes.vector_dim is not None:
        text, ids = RNG.standard_normal((2, 64)).astype("f"), np.float32([[8, 8, 0, 0, 8, 8], [9, 7, 1, 2, 6, 5]])
        added = {"added_cond_kwargs": {"text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(ids)}}
        sinusoids = theirs.add_time_proj(torch.from_numpy(ids).flatten()).numpy()
        vector = np.concatenate([text, sinusoids.reshape(2, -1)], axis=1)
    with torch.no_grad():
        expected = theirs(
            channels_first(x),
            torch.from_numpy(t),
            torch.from_numpy(context),
            down_intrablock_additional_residuals=[channels_first(f) for f in features],
            **added,
        ).sample
    cond = Cond(context=context, vector=vector, features=features)
    found = jax.jit(UNet(sizes).apply)({"params": params}, x, t, cond)
    np.testing.assert_allclose(found, channels_last(expected), atol=1e-4, rtol=0)
