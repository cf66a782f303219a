from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch_reference import GAINS, channels_first, channels_last, drawn, randomised, translated
from zoo import FACTOR, UNETS

from sdjax.checkpoints.mapping import places
from sdjax.checkpoints.networks import controlnet as conversion
from sdjax.checkpoints.networks import unet
from sdjax.core.tree import flatten, size
from sdjax.models.conditioning import Cond, apply
from sdjax.models.controlnet import VARIANTS, config_for, controlnet_of, trainable_copy
from sdjax.models.unet import UNet

# Of diffusers' ControlNetModel.from_unet on the published UNets; the small one is of XL's 1-block transformers.
TOTALS = {"sd1": 361_279_120, "sd2": 364_228_240, "sdxl": 1_251_014_160, "sdxl_small": 292_596_240}


def reference(name: str, gain: float = 1.0, **config: Any) -> ControlNetModel:
    """diffusers' ControlNet for a UNet of the zoo, every parameter random."""
    sizes = config_for(UNETS[name], FACTOR)
    return randomised(ControlNetModel.from_config({**conversion.to_diffusers_config(sizes), **config}), gain)


def inputs(name: str) -> tuple[np.ndarray, np.ndarray, Cond, np.ndarray, dict[str, Any]]:
    """Noisy latents, timesteps, a condition and a hint; and what diffusers is given besides."""
    rng, c = np.random.default_rng(1), UNETS[name]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    x, t, context = draw(2, 12, 8, 4), np.array([981.0, 3.5], np.float32), draw(2, 7, c.context_dim)
    hint = rng.random((2, 24, 16, 3), np.float32)
    if c.vector_dim is None:
        return x, t, Cond(context), hint, {}
    text, ids = draw(2, 64), rng.integers(0, 1024, (2, 6)).astype(np.float32)
    angles = ids.reshape(2, 6, 1) * np.exp(-np.log(1e4) * np.arange(128, dtype=np.float32) / 128)
    sinusoids = np.concatenate([np.cos(angles), np.sin(angles)], -1).reshape(2, -1)
    added = {"text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(ids)}
    return x, t, Cond(context, vector=np.concatenate([text, sinusoids], 1)), hint, {"added_cond_kwargs": added}


def test_parameter_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd1", {}),
        ("sd2", {"controlnet_conditioning_channel_order": "bgr"}),
        ("sdxl", {}),
        ("sd1", {"global_pool_conditions": True}),
    ],
)
def test_residuals_agree_with_diffusers_to_1e_4(name: str, changes: dict):
    x, t, cond, hint, added = inputs(name)
    run = None
    for gain in GAINS:
        theirs = reference(name, gain, **changes)
        config = conversion.from_diffusers_config(theirs.config)
        run = run or jax.jit(controlnet_of(config).apply)
        params = translated(theirs, conversion.table(config), conversion.shapes(config))
        with torch.no_grad():
            arrays = channels_first(x), torch.from_numpy(t), torch.from_numpy(np.asarray(cond.context))
            down, mid = theirs(*arrays, channels_first(hint), return_dict=False, **added)
        found = run({"params": params}, x, t, cond, hint)
        for ours, expected, level in zip(found, [*down, mid], config.residuals, strict=True):
            assert expected.shape[2] == (1 if config.global_pool else 12 // 2**level)
            assert np.abs(channels_last(expected)).max() > 1e-2
            np.testing.assert_allclose(ours, channels_last(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd1_inpainting", "sd1_lcm", "sdxl"])
def test_a_trainable_copy_is_the_unets_encoder_and_changes_nothing_yet(name: str):
    """Its leaves are those that diffusers copies, to the bit, and its residuals zero."""
    sizes, params = UNETS[name], drawn(unet.shapes(UNETS[name]))
    config = config_for(sizes, FACTOR)
    copy = jax.jit(lambda p, key: trainable_copy(config, p, key))(params, jax.random.key(0))
    assert jax.tree.map(np.shape, copy) == jax.tree.map(np.shape, conversion.shapes(config))
    ours, theirs = flatten(copy), flatten(params)
    made = {leaf for leaf in ours if leaf.startswith("controlnet_")}
    for leaf in ours.keys() - made:
        np.testing.assert_array_equal(ours[leaf], theirs[leaf][:, :, :4] if leaf == "conv_in/kernel" else theirs[leaf])
    with torch.device("meta"):
        of_unet = ControlNetModel.from_unet(
            UNet2DConditionModel.from_config({**unet.to_diffusers_config(sizes), "time_cond_proj_dim": None}),
            conditioning_embedding_out_channels=config.hint_features,
            load_weights_from_unet=False,
        )
    wanted = {key for key in of_unet.state_dict() if not key.startswith("controlnet_")}
    copied = places(conversion.table(config), ours.keys() - made)
    assert {place.key for place in copied.values()} == wanted
    assert not any(np.any(ours[leaf]) for leaf in made if leaf.startswith(("controlnet_down", "controlnet_mid")))
    assert not np.any(ours["controlnet_cond_embedding/conv_out/kernel"])
    assert np.std(ours["controlnet_cond_embedding/blocks_0/kernel"]) > 0.01


def test_a_fresh_copy_leaves_the_unets_output_to_the_bit():
    *given, hint, _ = inputs("sd1")
    params, config = drawn(unet.shapes(UNETS["sd1"])), config_for(UNETS["sd1"], FACTOR)
    copy = jax.jit(lambda p, key: trainable_copy(config, p, key))(params, jax.random.key(0))

    @jax.jit
    def controlled(params: Any, copy: Any, x: Any, t: Any, cond: Cond, hint: Any) -> jax.Array:
        residuals = apply(controlnet_of(config), copy, x, t, cond, hint)
        return apply(UNet(UNETS["sd1"]), params, x, t, cond._replace(control=residuals))

    plain = jax.jit(UNet(UNETS["sd1"]).apply)({"params": params}, *given)
    np.testing.assert_array_equal(controlled(params, copy, *given, hint), plain)
    moved = {**copy, "controlnet_mid_block": jax.tree.map(lambda leaf: leaf + 0.1, copy["controlnet_mid_block"])}
    assert np.abs(controlled(params, moved, *given, hint) - plain).max() > 1e-3
