"""The UNet of DDPM, ADM and LDM's other models beside diffusers' UNet2DModel, and totals of all published ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from original_names import unet2d_original
from torch_reference import GAINS, channels_first, channels_last, randomised, translated

from sdjax.checkpoints.mapping import export, read
from sdjax.checkpoints.networks import unet2d as conversion
from sdjax.checkpoints.original_keys import inward, outward
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, size
from sdjax.models.conditioning import Cond
from sdjax.models.unet2d import VARIANTS, UNet2D

# CompVis/latent-diffusion configs/ and openai/guided-diffusion's README flags, counted by hand from the code.
TOTALS = {
    "ldm_celebahq": 274_056_163,
    "ldm_churches": 294_966_916,
    "ldm_bsr_sr": 113_622_563,
    "ldm_inpainting": 387_245_827,
    "ldm_semantic": 215_229_315,
    "adm_64": 295_904_454,
    "adm_128": 421_529_606,
    "adm_256": 553_838_086,
    "adm_256_uncond": 552_814_086,  # without 1000 x 1024 embeddings of classes
    "adm_512": 558_997_638,
    "adm_64_256": 311_795_910,
    "adm_128_512": 308_835_270,
}
SIZES = {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": 8}
PLAIN = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
ADM = {
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "num_class_embeds": 7,
    "out_channels": 6,
}


def test_parameter_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS


# google/ddpm-cifar10-32 and its kin.
DDPM = PLAIN | {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-2,  # theirs is 1e-6, by which no output here would differ from that of 1e-5
    "attention_head_dim": None,
}


@pytest.mark.parametrize("structure", [PLAIN, ADM, DDPM], ids=["LDM", "ADM", "DDPM"])
def test_output_agrees_with_diffusers_to_1e_4(structure, monkeypatch):
    monkeypatch.setitem(conversion.ALLOWED, "attn_norm_num_groups", (None, 8))
    theirs = UNet2DModel(sample_size=16, **{**SIZES, **structure})
    config = conversion.from_diffusers_config(theirs.config)
    model = UNet2D(config)
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((2, 16, 24, 3)).astype("f"), np.array([3, 871])
    label = None if config.classes is None else np.array([2, 6])
    forward = jax.jit(lambda params: model.apply({"params": params}, x, jnp.asarray(t, jnp.float32), Cond(label=label)))
    for gain in GAINS:
        params = translated(randomised(theirs, gain), conversion.TABLE, conversion.shapes(config))
        with torch.no_grad():
            given = None if label is None else torch.tensor(label)
            expected = channels_last(theirs(channels_first(x), torch.tensor(t), class_labels=given).sample)
        assert expected.std() > 0.1
        np.testing.assert_allclose(forward(params), expected, atol=1e-4, rtol=0)
    again = conversion.from_diffusers_config(conversion.to_diffusers_config(config))
    assert again == config


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("name", ["plain", "adm"])
def test_original_keys_become_diffusers(name, new_order):
    """An original state made from ours by its own rules, written out here by hand for the joint attention."""
    structure = {"plain": PLAIN, "adm": {**ADM, "attn_norm_num_groups": 32, "norm_num_groups": 16}}[name]
    config = conversion.from_diffusers_config({**SIZES, **structure})
    table, rng = conversion.TABLE, np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f"), conversion.shapes(config))
    stored = {key: np.array(value) for key, value in export(table, params, conversion.shapes(config), "").items()}
    original = unet2d_original(stored, config, new_order)
    assert not set(original) & set(stored)
    assert any(".qkv." in key for key in original)
    pieces = conversion.pieces(config, new_order)
    found = read(table, inward(pieces, original), conversion.shapes(config), np.float32, "")
    again = {key: np.asarray(whole) for key, whole in outward(pieces, stored).items()}
    assert again.keys() == original.keys()
    for key, array in original.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)
    for key, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found)[key], leaf, err_msg=key)


def test_what_diffusers_cannot_say_is_an_error():
    with pytest.raises(UserError, match="neither heads of different widths"):
        conversion.to_diffusers_config(VARIANTS["ldm_inpainting"])
    with pytest.raises(UserError, match="that is 256 wide where the first level has 128 channels"):
        conversion.to_diffusers_config(VARIANTS["adm_512"])
    for key, value in (
        ("downsample_type", "conv2d"),
        ("num_class_embeds", 0),
        ("attention_head_dim", "8"),
        ("freq_shift", 2),
    ):
        with pytest.raises(UserError, match=key):
            conversion.from_diffusers_config({**SIZES, **PLAIN, key: value})
