"""The original layout at the published sizes: every key, every shape, the exact totals; no weights are made."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from published import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, SD_VAE, UNETS, VAES
from test_unet_configs import X4_UPSCALER

from sdjax.checkpoints.checkpoint import FORMATS
from sdjax.checkpoints.families import FAMILIES, UNET, VAE
from sdjax.checkpoints.layouts.original import Detected, Network, networks_in
from sdjax.checkpoints.layouts.original_writer import pieces_of
from sdjax.checkpoints.mapping import stored_shapes

FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
TEXTS = {
    "sd1": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": OPENCLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG},
    "sdxl_refiner": {"text_encoder_2": OPENCLIP_BIGG},
    "x4_upscaler": {"text_encoder": OPENCLIP_H},
}
PUBLISHED_VAES = {
    "sd1": SD_VAE,
    "sd2": SD_VAE,
    "sdxl": VAES["sdxl"],
    "sdxl_refiner": VAES["sdxl"],
    "x4_upscaler": SD_VAE
    | {
        "block_out_channels": [128, 256, 512],
        "down_block_types": SD_VAE["down_block_types"][:3],
        "scaling_factor": 0.08333,
        "up_block_types": SD_VAE["up_block_types"][:3],
    },
}
TOTALS = {  # UNet, autoencoder, text encoders; Stable Diffusion 2 uses all layers of its own but the last
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd2": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "sdxl_refiner": (2_259_526_660, 83_653_863, 694_659_840),
    "x4_upscaler": (473_398_020, 55_325_927, 340_387_840),
}
# Keys by which diffusers tells the published files apart (diffusers/loaders/single_file_utils.py).
MARKS = {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base", "sdxl_refiner": "xl_refiner", "x4_upscaler": "upscale"}
SOME_KEYS = {
    "sd1": {
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.bias": (1280,),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "first_stage_model.decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    },
    "sd2": {"cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024)},
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
    "sdxl_refiner": {
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1536, 1536, 3, 3),
        "conditioner.embedders.0.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
    },
    "x4_upscaler": {
        "model.diffusion_model.label_emb.weight": (1000, 1024),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight": (512, 1024),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (512, 512, 3, 3),
    },
}


def published_networks(family: str) -> list[Network]:
    unets = UNETS | {"x4_upscaler": X4_UPSCALER}
    configs = {"unet": unets[family], "vae": PUBLISHED_VAES[family], **TEXTS[family]}
    prefixes = {"unet": UNET, "vae": VAE, **FAMILIES[family].prefixes}
    networks = []
    for name, raw in configs.items():
        config = FORMATS[name].from_config(raw, name)
        networks.append(Network(name, prefixes[name], config, {}, pieces_of(name, prefixes[name], config)))
    return networks


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def diffusers_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    form = FORMATS[network.name]
    return stored_shapes(form.table(network.config), form.shapes(network.config))


def converted(network: Network) -> dict[str, torch.Tensor]:
    """What diffusers' converters make of a file with our original keys."""
    file = on_meta(network.original_shapes())
    config = FORMATS[network.name].to_config(network.config)
    if network.name == "unet":
        return theirs.convert_ldm_unet_checkpoint(file, config)
    if network.name == "vae":
        return theirs.convert_ldm_vae_checkpoint(file, config)
    if not network.is_open_clip:
        return theirs.convert_ldm_clip_checkpoint(file)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=network.config.width))
    return theirs.convert_open_clip_checkpoint(model, file, network.prefix)


@pytest.mark.parametrize("family", TOTALS)
def test_every_key_of_the_published_sizes(family: str):
    networks = published_networks(family)
    original = {key: shape for network in networks for key, shape in network.original_shapes().items()}
    assert SOME_KEYS[family].items() <= original.items()
    assert theirs.infer_diffusers_model_type(on_meta(original)) == MARKS[family]
    for network, total in zip(networks, TOTALS[family], strict=True):
        assert sum(math.prod(shape) for shape in network.original_shapes().values()) == total
        shapes = {key: tuple(tensor.shape) for key, tensor in converted(network).items()}
        assert shapes == diffusers_shapes(network), network.name


@pytest.mark.parametrize("family", TOTALS)
def test_the_published_sizes_are_found_in_the_shapes(family: str):
    networks = published_networks(family)
    shapes = {key: shape for network in networks for key, shape in network.original_shapes().items()}
    found = networks_in(shapes, Detected(family, "epsilon", "", 4), family)
    for network in networks:
        other = next(n for n in found if n.name == network.name)
        sizes, expected = vars(other.config) | {"eos_token_id": 2}, vars(network.config) | {"eos_token_id": 2}
        assert sizes == expected
        assert other.pieces == network.pieces


def test_what_a_config_says_beside_its_sizes():
    shapes = {key: shape for network in published_networks("sdxl") for key, shape in network.original_shapes().items()}
    unet, vae = networks_in(shapes, Detected("sdxl", "epsilon", "", 4), "")[:2]
    assert (unet.extra["sample_size"], vae.extra["sample_size"], vae.extra["force_upcast"]) == (128, 1024, True)
    shapes = {key: shape for network in published_networks("sd2") for key, shape in network.original_shapes().items()}
    for prediction, size in (("v_prediction", 96), ("epsilon", 64)):
        assert networks_in(shapes, Detected("sd2", prediction, "", 4), "")[0].extra["sample_size"] == size
