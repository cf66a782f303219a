"""The UNet of DeepFloyd IF and of Karlo's decoder beside diffusers' UNet2DConditionModel, and published totals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch_reference import GAINS, channels_first, channels_last, randomised, translated

from sdjax.checkpoints.networks import added_kv_unet as conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import size
from sdjax.models.added_kv_unet import VARIANTS, AddedKVUNet
from sdjax.models.conditioning import Cond

# Of diffusers' class with the configs of the released folders, on its meta device.
TOTALS = {
    "if_i_m": 371_605_830,
    "if_i_l": 935_365_830,
    "if_i_xl": 4_304_695_110,
    "if_ii_m": 535_441_926,
    "if_ii_l": 1_243_277_190,
    "karlo": 885_439_686,
    "imagen_base": 2_305_382_403,
}
CROSS_ONLY_TOTALS = {"if_ii_m": 512_999_430, "if_ii_l": 1_183_628_550}

PLAIN: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
STAGE_I = PLAIN | {
    "act_fn": "gelu",
    "encoder_hid_dim": 64,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
}
STAGE_II = STAGE_I | {
    "in_channels": 6,
    "layers_per_block": [1, 2],
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 48,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
}
STRUCTURES = {
    "stage I": STAGE_I,
    "stage II": STAGE_II,
    "stage II, text alone": STAGE_II | {"only_cross_attention": True},
    "Karlo": PLAIN | {"class_embed_type": "identity"},
}
SIDES, TOKENS, BATCH = (16, 24), 11, 2


def test_parameter_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS
    alone = {name: dataclasses.replace(VARIANTS[name], cross_only=True) for name in CROSS_ONLY_TOTALS}
    assert {name: size(conversion.shapes(config)) for name, config in alone.items()} == CROSS_ONLY_TOTALS


@pytest.mark.parametrize("name", STRUCTURES)
def test_output_agrees_with_diffusers_to_2e_5(name):
    """Non-square images and a text without a mask, but for Karlo; stage II has a noise level and is given images."""
    structure = STRUCTURES[name]
    theirs = UNet2DConditionModel(sample_size=16, **structure)
    config = conversion.from_diffusers_config(theirs.config)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, *SIDES, config.in_channels)).astype("f")
    t, text = np.array([3, 871]), rng.standard_normal((BATCH, TOKENS, config.context_dim)).astype("f")
    label = None if config.classes is None else np.array([250, 999])
    vector = None if config.vector_dim is None else rng.standard_normal((BATCH, config.vector_dim)).astype("f")
    mask = np.arange(TOKENS) < np.array([[4], [9]]) if name == "Karlo" else None
    noisy, low = (x, None) if label is None else np.split(x, 2, axis=-1)
    cond = Cond(text, mask, vector, concat=low, label=label)
    forward = jax.jit(lambda params: AddedKVUNet(config).apply({"params": params}, noisy, jnp.asarray(t, "f"), cond))
    labels = next((torch.tensor(given) for given in (label, vector) if given is not None), None)
    for gain in GAINS:
        params = translated(randomised(theirs, gain), conversion.TABLE, conversion.shapes(config))
        with torch.no_grad():
            expected = theirs(
                channels_first(x),
                torch.tensor(t),
                torch.tensor(text),
                class_labels=labels,
                attention_mask=None if mask is None else torch.tensor(mask),
            ).sample
        assert expected.std() > 0.1
        np.testing.assert_allclose(forward(params), channels_last(expected), atol=2e-5, rtol=0)


def released(channels: list[int], plain: int, **sizes: Any) -> dict[str, Any]:
    """A released config.json, cut to what shapes the network; the first `plain` levels have no attention."""
    attending = len(channels) - plain
    blocks = {
        "down_block_types": ["ResnetDownsampleBlock2D"] * plain + ["SimpleCrossAttnDownBlock2D"] * attending,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * attending + ["ResnetUpsampleBlock2D"] * plain,
    }
    kept = {key: STAGE_I[key] for key in ("act_fn", "addition_embed_type", "cross_attention_norm", "out_channels")}
    kept |= {key: PLAIN[key] for key in ("mid_block_type", "resnet_time_scale_shift", "in_channels")}
    text = {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj", "addition_embed_type_num_heads": 64}
    more = {"cross_attention_dim": channels[-1], "attention_head_dim": 64, "block_out_channels": channels}
    return {**kept, **text, **blocks, **more, **sizes}


SECOND = {key: STAGE_II[key] for key in STAGE_II if STAGE_II[key] != STAGE_I.get(key)}
RELEASED = {
    "if_i_m": released([192, 384, 576, 768], 1, layers_per_block=3),
    "if_i_xl": released([704, 1408, 2112, 2816], 1, layers_per_block=3, time_embedding_dim=None),
    "if_ii_l": released(
        [160, 320, 640, 960, 1280], 3, **SECOND | {"layers_per_block": [2, 2, 3, 5, 5], "time_embedding_dim": 1280}
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_the_variants(name):
    assert conversion.from_diffusers_config(RELEASED[name]) == VARIANTS[name]


@pytest.mark.parametrize("name", STRUCTURES)
def test_configs_are_written_as_diffusers_reads_them(name):
    config = conversion.from_diffusers_config(STRUCTURES[name])
    again = conversion.to_diffusers_config(config)
    assert conversion.from_diffusers_config(again) == config
    with torch.device("meta"):
        theirs, own = (UNet2DConditionModel.from_config(each).state_dict() for each in (STRUCTURES[name], again))
    assert {key: leaf.shape for key, leaf in own.items()} == {key: leaf.shape for key, leaf in theirs.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift = 'default'.*'scale_shift'"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention.*true or false"),
        ({"time_embedding_act_fn": None}, "time_embedding_act_fn = None.*'gelu' beside its resnet_skip_time_act"),
        ({"mid_block_scale_factor": 1}, "mid_block_scale_factor = 1 .*beside its resnet_out_scale_factor"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention = True.*null"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24.*a divisor of each of"),
        ({"attention_head_dim": [8, 16]}, "attention_head_dim.*the same at every level"),
        ({"addition_embed_type_num_heads": 5}, "addition_embed_type_num_heads = 5.*a divisor of 64"),
        ({"cross_attention_dim": 40}, "cross_attention_dim = 40.*a multiple of 32"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types.*SimpleCrossAttnUpBlock2D"),
        ({"class_embed_type": "projection"}, "class_embed_type = 'projection'"),
    ],
)
def test_other_structures_are_errors_of_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        conversion.from_diffusers_config(STAGE_II | change)
    assert "\n" not in str(error.value)
