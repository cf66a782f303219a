"""The UNet of DDPM, ADM and LDM's other models beside diffusers' UNet2DModel, and totals of all published ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch_reference import GAINS, channels_first, channels_last, randomised, translated

from sdjax.convert import unet2d as conversion
from sdjax.convert.rules import export, read
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


def test_parameter_totals_are_those_of_the_published_models():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS


@pytest.mark.parametrize("structure", [PLAIN, ADM], ids=["LDM", "ADM"])
def test_output_agrees_with_diffusers_to_1e_4(structure, monkeypatch):
    monkeypatch.setitem(conversion.ALLOWED, "attn_norm_num_groups", (None, 8))
    theirs = UNet2DModel(sample_size=16, **SIZES, **structure)
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
    original = original_of(stored, config, new_order)
    assert not set(original) & set(stored)
    assert any(".qkv." in key for key in original)
    found = read(
        table,
        conversion.from_original(original, config, new_order=new_order),
        conversion.shapes(config),
        np.float32,
        "",
    )
    for key, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found)[key], leaf, err_msg=key)


def original_of(stored, config, new_order):
    """guided-diffusion's naming, block by block in the order in which its constructor makes them."""
    layers, levels = config.layers_per_block, len(config.channels)
    blocks = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    blocks |= {"class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0"}
    blocks |= {"conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    blocks |= {"mid_block.resnets.1": "middle_block.2"}
    number = 1
    for i in range(levels):
        for j in range(layers):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if i < levels - 1:
            blocks[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    number = 0
    for i in range(levels):
        for j in range(layers + 1):
            parts = [f"up_blocks.{i}.resnets.{j}"]
            if levels - 1 - i in config.attention_levels:
                parts.append(f"up_blocks.{i}.attentions.{j}")
            if j == layers and i < levels - 1:
                parts.append(f"up_blocks.{i}.upsamplers.0")
            blocks |= {part: f"output_blocks.{number}.{place}" for place, part in enumerate(parts)}
            number += 1
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection", "group_norm": "norm"}
    made = {}
    for module, block in blocks.items():
        rests = {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")}
        if any(rest.startswith("to_q") for rest in rests):
            level = -1 if "mid" in module else int(module.split(".")[1])
            heads = config.heads[::-1][level] if "up_" in module else config.heads[level]
            for kind in ("weight", "bias"):
                parts = [rests.pop(f"to_{letter}.{kind}") for letter in "qkv"]
                if new_order:
                    joint = np.concatenate(parts)
                else:
                    heads_of = [np.split(part, heads) for part in parts]
                    joint = np.concatenate([part for head in zip(*heads_of, strict=True) for part in head])
                made[f"{block}.qkv.{kind}"] = joint[:, :, None] if kind == "weight" else joint
                out = rests.pop(f"to_out.0.{kind}")
                made[f"{block}.proj_out.{kind}"] = out[:, :, None] if kind == "weight" else out
        for rest, value in rests.items():
            module_name, _, kind = rest.rpartition(".")
            # A resampling convolution is "op" on the way down, "conv" on the way up.
            if module_name == "conv":
                module_name = "op" if "down" in module else "conv"
            made[".".join(filter(None, (block, inner.get(module_name, module_name), kind)))] = value
    assert len(made) >= len(stored) - 4 * sum("to_q.weight" in key for key in stored)
    return made


def test_what_diffusers_cannot_say_is_an_error():
    with pytest.raises(UserError, match="neither heads of different widths"):
        conversion.to_diffusers_config(VARIANTS["ldm_inpainting"])
    with pytest.raises(UserError, match="that is 256 wide where the first level has 128 channels"):
        conversion.to_diffusers_config(VARIANTS["adm_512"])
    for key, value in (("downsample_type", "conv2d"), ("num_class_embeds", 0), ("attention_head_dim", "8")):
        with pytest.raises(UserError, match=key):
            conversion.from_diffusers_config({**SIZES, **PLAIN, key: value})
