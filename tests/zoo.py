"""Tiny networks of every kind, and the one shape that tests give them.

A program is compiled for its sizes and shapes: tests that take theirs from here share programs, in a run and, by the
folder of compiled programs, with later runs. Widths of Stable Diffusion's networks are multiples of 64 and groups are
32, as in the published models, so that files in the original naming, which say neither, can be told apart and read.
"""

from __future__ import annotations

from sdjax.models.added_kv_unet import AddedKVUNetConfig
from sdjax.models.adm_classifier import ClassifierConfig
from sdjax.models.autoencoder import AutoencoderConfig, VQConfig
from sdjax.models.bert import BertConfig
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.prior import PriorConfig
from sdjax.models.t5 import T5Config
from sdjax.models.unet import UNetConfig
from sdjax.models.unet2d import UNet2DConfig

FACTOR = 2  # pixels of a latent, along each side
SIDE = 16  # pixels of an image, in height and in width
BATCH = 2  # images
STEPS = 4  # of a sampler
TOKENS = 12  # of a prompt

# Two levels, the finer one with transformers.
_SD1 = {"channels": (64, 128), "depths": (1, 0), "heads": (8, 8), "context_dim": 64, "layers_per_block": 1}
_SD2 = _SD1 | {"heads": (1, 2), "linear_projection": True}
# Three, so that both kinds of upsampling keys of the original layout are there.
_SDXL = {"channels": (64, 64, 128), "heads": (1, 1, 2), "linear_projection": True, "layers_per_block": 1}

UNETS = {
    "sd1": UNetConfig(**_SD1),
    "sd1_inpainting": UNetConfig(**_SD1, in_channels=9),
    "sd1_lcm": UNetConfig(**_SD1, guidance_dim=16),
    "sd2": UNetConfig(**_SD2),
    "sd2_depth": UNetConfig(**_SD2, in_channels=5),
    "sdxl": UNetConfig(**_SDXL, depths=(0, 1, 2), mid_depth=2, context_dim=128, vector_dim=64 + 6 * 256),
    "sdxl_refiner": UNetConfig(**_SDXL, depths=(0, 1, 0), context_dim=64, vector_dim=64 + 5 * 256),
    "x4_upscaler": UNetConfig(
        **_SDXL | {"heads": (8, 8, 8)}, depths=(0, 1, 1), context_dim=64, classes=10, cross_only=(1,), in_channels=7
    ),
}

_VAE = {"channels": (32, 64), "layers_per_block": 1}
VAES = {
    "sd": AutoencoderConfig(**_VAE),
    "sdxl": AutoencoderConfig(**_VAE, scaling_factor=0.13025),
    "x4_upscaler": AutoencoderConfig(**_VAE, scaling_factor=0.08333),
    # LDM's first stages, f = 4.
    "kl_f4": AutoencoderConfig((8, 8, 16), 3, layers_per_block=1, groups=4, scaling_factor=1.0),
    "vq_f4": VQConfig((8, 8, 16), 3, layers_per_block=1, groups=4, codes=64),
}

# Diffusion without text: of pixels as ADM has it, with learned variances, and of LDM's latents.
ADM = UNet2DConfig(
    (32, 64), (1,), (1, 2), out_channels=6, layers_per_block=1, scale_shift=True, resblock_updown=True, classes=10
)
LDM = UNet2DConfig((32, 64), (1,), (2, 2), layers_per_block=1)
CLASSIFIER = ClassifierConfig(
    UNet2DConfig((32, 64), (1,), (1, 2), layers_per_block=1, scale_shift=True, resblock_updown=True), SIDE, classes=10
)
BERT = BertConfig(vocab_size=400, width=32, layers=1, heads=1, max_length=11)
_IF = {
    "channels": (32, 64),
    "attention_levels": (1,),
    "head_width": 8,
    "cross_dim": 32,
    "text_dim": 32,
    "pool_heads": 2,
}
IF = {
    "if_i": AddedKVUNetConfig(**_IF, layers=(1, 1)),
    "if_ii": AddedKVUNetConfig(
        **_IF, layers=(1, 2), embedding_dim=48, classes=1000, activated=True, output_divisor=1 / 0.7071, in_channels=6
    ),
}
T5 = T5Config(vocab_size=400, width=32, layers=2, heads=3, head_size=8, feed_forward=48)
PRIOR = PriorConfig(embedding_dim=32, layers=2, heads=3, head_size=8, tokens=TOKENS)


def ldm_unet(context_dim: int, in_channels: int = 3) -> UNetConfig:
    """LDM's UNet that attends to a condition, over latents of three channels."""
    return UNetConfig(
        (32, 64), (0, 1), 1, (2, 2), context_dim, in_channels=in_channels, out_channels=3, layers_per_block=1
    )


def clip_text(
    vocab_size: int, eos_token_id: int, max_length: int = TOKENS, *, projects: bool = False, open_clip: bool = False
) -> CLIPTextConfig:
    """CLIP's text encoder of two layers; `projects` is SDXL's second one."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        width=64,
        layers=2,
        heads=1,
        feed_forward=256,
        activation="gelu" if open_clip else "quick_gelu",
        max_length=max_length,
        projection_dim=64 if projects else None,
        eos_token_id=eos_token_id,
    )
