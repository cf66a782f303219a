"""The tables and config mappings against the torch modules of the published sizes, built without memory for weights."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
import transformers
from published import CLIPS, SD1_UNET, SDXL_UNET, UNET_TOTALS, UNETS, VAES

from sdjax.checkpoints.mapping import stored_shapes
from sdjax.checkpoints.networks import autoencoder, clip, controlnet, unet
from sdjax.core.errors import UserError
from sdjax.models.autoencoder import VARIANTS as AUTOENCODERS
from sdjax.models.clip import VARIANTS as CLIP_TEXTS
from sdjax.models.controlnet import VARIANTS as CONTROLNET_VARIANTS
from sdjax.models.unet import VARIANTS as UNET_VARIANTS
from sdjax.models.unet import UNetConfig


def on_meta(build) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


@pytest.mark.parametrize("name", UNETS)
def test_every_key_of_a_unet_and_its_shape(name: str):
    config = unet.from_diffusers_config(UNETS[name])
    assert config == UNET_VARIANTS[name]
    theirs = on_meta(lambda: diffusers.UNet2DConditionModel.from_config(UNETS[name]))
    assert stored_shapes(unet.table(config), unet.shapes(config)) == theirs
    assert sum(map(math.prod, theirs.values())) == UNET_TOTALS[name]
    exported = unet.to_diffusers_config(config)
    assert unet.from_diffusers_config(exported) == config
    assert on_meta(lambda: diffusers.UNet2DConditionModel.from_config(exported)) == theirs


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_key_of_a_controlnet_and_its_shape(name: str):
    own = {key: value for key, value in UNETS[name].items() if key not in ("up_block_types", "out_channels")}
    config = controlnet.from_diffusers_config(own)
    assert config == CONTROLNET_VARIANTS[name]
    theirs = on_meta(lambda: diffusers.ControlNetModel.from_config(own))
    assert stored_shapes(controlnet.table(config), controlnet.shapes(config)) == theirs
    exported = controlnet.to_diffusers_config(config)
    assert controlnet.from_diffusers_config(exported) == config
    assert on_meta(lambda: diffusers.ControlNetModel.from_config(exported)) == theirs


@pytest.mark.parametrize("name", VAES)
def test_every_key_of_an_autoencoder_and_its_shape(name: str):
    config = autoencoder.from_diffusers_config(VAES[name])
    assert config == AUTOENCODERS[name]
    theirs = on_meta(lambda: diffusers.AutoencoderKL.from_config(VAES[name]))
    assert stored_shapes(autoencoder.TABLE, autoencoder.shapes(config)) == theirs
    exported = autoencoder.to_diffusers_config(config)
    assert autoencoder.from_diffusers_config(exported) == config
    assert on_meta(lambda: diffusers.AutoencoderKL.from_config(exported)) == theirs


@pytest.mark.parametrize("name", CLIPS)
def test_every_key_of_a_text_encoder_and_its_shape(name: str):
    config = clip.from_diffusers_config(CLIPS[name])
    assert config == CLIP_TEXTS[name]

    def build(settings: dict) -> torch.nn.Module:
        kind = getattr(transformers, settings["architectures"][0])
        return kind(transformers.CLIPTextConfig(**settings))

    theirs = on_meta(lambda: build(CLIPS[name]))
    ours = stored_shapes(clip.TABLE, clip.shapes(config))
    if (
        config.projection_dim is None
    ):  # published files have the prefix; the module itself has lost it in transformers 5
        theirs = {f"text_model.{key}": shape for key, shape in theirs.items()}
    assert ours == theirs
    exported = clip.to_diffusers_config(config)
    assert clip.from_diffusers_config(exported) == config
    assert transformers.CLIPTextConfig(**exported).eos_token_id == 2


@pytest.mark.parametrize(
    ("convert", "config", "key", "value"),
    [
        (unet, SD1_UNET, "down_block_types", ["AttnDownBlock2D"] * 4),
        (unet, SD1_UNET, "up_block_types", ["CrossAttnUpBlock2D"] * 4),
        (unet, SD1_UNET, "class_embed_type", "projection"),
        (unet, SD1_UNET, "resnet_time_scale_shift", "scale_shift"),
        (unet, SD1_UNET, "mid_block_type", "UNetMidBlock2D"),
        (unet, SD1_UNET, "block_out_channels", "320"),
        (unet, SD1_UNET, "attention_head_dim", 7),
        (unet, SD1_UNET, "layers_per_block", [2, 2, 2, 3]),
        (unet, SDXL_UNET, "projection_class_embeddings_input_dim", None),
        (unet, SDXL_UNET, "addition_embed_type", "text_image"),
        (unet, SDXL_UNET, "transformer_layers_per_block", [1, 2]),
        (controlnet, SD1_UNET, "controlnet_conditioning_channel_order", "gbr"),
        (controlnet, SD1_UNET, "_class_name", "ControlNetUnionModel"),
        (controlnet, SD1_UNET, "conditioning_embedding_out_channels", 16),
        (controlnet, SD1_UNET, "down_block_types", "CrossAttnDownBlock2D"),
        (autoencoder, VAES["sd"], "down_block_types", ["AttnDownEncoderBlock2D"] * 3),
        (autoencoder, VAES["sd"], "up_block_types", ["UpDecoderBlock2D"] * 3),
        (autoencoder, VAES["sd"], "use_quant_conv", False),
        (autoencoder, VAES["sd"], "shift_factor", 0.1),
        (autoencoder, VAES["sd"], "scaling_factor", "big"),
        (clip, CLIPS["clip_l"], "hidden_act", "relu"),
        (clip, CLIPS["clip_l"], "model_type", "bert"),
        (clip, CLIPS["clip_l"], "architectures", ["CLIPModel"]),
        (clip, CLIPS["clip_l"], "num_attention_heads", 7),
        (clip, CLIPS["clip_l"], "vocab_size", -1),
    ],
)
def test_unsupported_structure_names_key_value_file(convert, config: dict, key: str, value: object):
    with pytest.raises(UserError) as error:
        convert.from_diffusers_config(config | {key: value}, "X/config.json")
    message = str(error.value)
    assert key in message
    assert repr(value) in message
    assert "X/config.json" in message
    assert "\n" not in message


def test_unet_beyond_diffusers_is_not_exported():
    with pytest.raises(UserError, match="mid_depth 2"):
        unet.to_diffusers_config(UNetConfig(depths=(1, 1, 1, 1), mid_depth=2))
