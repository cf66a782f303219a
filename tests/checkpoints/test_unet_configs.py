"""What configs of UNets in circulation ask for, against diffusers built from the same config; what else is refused.

The configs are those of checkpoints on the Hugging Face Hub, cut to the keys that shape the network:
stabilityai/stable-diffusion-x4-upscaler, stable-diffusion-2-depth and stable-diffusion-2-inpainting,
diffusers/stable-diffusion-xl-1.0-inpainting-0.1, SimianLuo/LCM_Dreamshaper_v7 and latent-consistency/lcm-sdxl.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from published import SD1_UNET, SD2_UNET, SDXL_UNET, UNET_TOTALS

from sdjax.checkpoints.mapping import export, read, stored_shapes
from sdjax.checkpoints.networks import unet
from sdjax.core.errors import UserError
from sdjax.models.unet import VARIANTS, UNetConfig

CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
X4_UPSCALER = SD2_UNET | {
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", *[CROSS[0]] * 3],
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "up_block_types": [*[CROSS[1]] * 3, "UpBlock2D"],
}
NULLS = dict.fromkeys(
    [
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "mid_block_only_cross_attention",
        "num_attention_heads",
        "num_class_embeds",
        "reverse_transformer_layers_per_block",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
    ]
)
LCM = {"attention_type": "default", "dropout": 0.0, "resnet_time_scale_shift": "default", "time_cond_proj_dim": 256}
CIRCULATING = {
    "x4_upscaler": X4_UPSCALER,
    "sd1_inpaint": SD1_UNET | {"in_channels": 9},
    "sd1_lcm": SD1_UNET | NULLS | LCM,
    "sd2_depth": SD2_UNET | {"in_channels": 5},
    "sd2_inpaint": SD2_UNET | {"in_channels": 9},
    "sdxl_inpaint": SDXL_UNET | NULLS | {"in_channels": 9},
    "sdxl_lcm": SDXL_UNET | NULLS | LCM,
}
TINY: dict[str, Any] = {
    "attention_head_dim": 2,
    "block_out_channels": [16, 32],
    "cross_attention_dim": 6,
    "down_block_types": ["DownBlock2D", CROSS[0]],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "up_block_types": [CROSS[1], "UpBlock2D"],
}
TINY_SIZES = UNetConfig((16, 32), depths=(0, 1), mid_depth=1, heads=(2, 2), context_dim=6, layers_per_block=1, groups=8)


def tensors(config: dict[str, Any], device: str = "meta") -> dict[str, torch.Tensor]:
    with torch.device(device):
        return UNet2DConditionModel.from_config(config).state_dict()


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(config).items()}


@pytest.mark.parametrize("name", CIRCULATING)
def test_keys_shapes_and_exported_config_match_diffusers(name: str):
    config = unet.from_diffusers_config(CIRCULATING[name])
    assert config == VARIANTS[name]
    theirs = shapes(CIRCULATING[name])
    assert stored_shapes(unet.table(config), unet.shapes(config)) == theirs
    assert sum(map(math.prod, theirs.values())) == UNET_TOTALS[name]
    exported = unet.to_diffusers_config(config)
    assert unet.from_diffusers_config(exported) == config
    assert shapes(exported) == theirs


@pytest.mark.parametrize(
    ("added", "key"),
    [
        ({"num_class_embeds": 5, "only_cross_attention": [False, True]}, "class_embedding.weight"),
        ({"time_cond_proj_dim": 10}, "time_embedding.cond_proj.weight"),
    ],
)
def test_diffusers_tensors_come_back_bit_identical(added: dict[str, Any], key: str):
    config = unet.from_diffusers_config(TINY | added)
    stored = {name: tensor.numpy() for name, tensor in tensors(TINY | added, "cpu").items()}
    table, ours = unet.table(config), unet.shapes(config)
    again = export(table, read(table, stored, ours, np.float32, ""), ours, "")
    assert key in stored
    assert again.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize(
    "said",
    [
        {"attention_head_dim": [2, 2]},
        {"attention_type": "default", "dual_cross_attention": False, "dropout": 0.1},
        {"cross_attention_dim": [6, 6], "layers_per_block": [1, 1]},
        {"mid_block_only_cross_attention": True},
        {"only_cross_attention": [True, False]},  # the first level has no transformers
        {"resnet_time_scale_shift": "default", "upcast_attention": True},
        {"time_embedding_dim": 64},
        {"transformer_layers_per_block": [0, 1]},
        {"transformer_layers_per_block": [7, 1], "reverse_transformer_layers_per_block": [1, 7]},
        NULLS | {"time_cond_proj_dim": None},
    ],
)
def test_other_ways_to_say_the_same_network(said: dict[str, Any]):
    """Tensors of the same names and shapes in diffusers, and the same sizes here."""
    assert shapes(TINY | said) == shapes(TINY)
    assert unet.from_diffusers_config(TINY | said) == TINY_SIZES


def test_cross_only_attention_is_per_level():
    both = TINY | {"down_block_types": [CROSS[0]] * 2, "up_block_types": [CROSS[1]] * 2}
    for only, levels in ((True, (0, 1)), ([True, False], (0,)), ([False, True], (1,))):
        config = unet.from_diffusers_config(both | {"only_cross_attention": only})
        assert config.cross_only == levels
        assert unet.from_diffusers_config(unet.to_diffusers_config(config)) == config
        assert stored_shapes(unet.table(config), unet.shapes(config)) == shapes(both | {"only_cross_attention": only})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_type", "gated"),
        ("class_embed_type", "timestep"),
        ("cross_attention_dim", [6, 7]),
        ("dual_cross_attention", True),
        ("encoder_hid_dim_type", "text_proj"),
        ("mid_block_type", None),
        ("num_attention_heads", 4),
        ("num_class_embeds", 0),
        ("num_class_embeds", "many"),
        ("only_cross_attention", [True]),
        ("only_cross_attention", [1, 0]),
        ("only_cross_attention", None),
        ("reverse_transformer_layers_per_block", [[2, 1], [1]]),
        ("time_cond_proj_dim", -256),
        ("time_embedding_dim", 65),
        ("time_embedding_type", "fourier"),
        ("transformer_layers_per_block", [1, 0]),
        ("transformer_layers_per_block", [1, [1, 2]]),
    ],
)
def test_other_structure_names_key_value_file(key: str, value: object):
    with pytest.raises(UserError) as error:
        unet.from_diffusers_config(TINY | {key: value}, "X/config.json")
    message = str(error.value)
    assert f"{key} = {value!r} in X/config.json" in message
    assert "must be" in message
    assert "\n" not in message
