"""Cascades in pixels from captions: a small image, then models that enlarge it (Imagen, Saharia et al. 2022).

    python train.py --config configs/imagen.py:openmoji_base --workdir runs/base
    python train.py --config configs/imagen.py:openmoji_sr64 --workdir runs/sr64
    python sample.py --config configs/imagen.py --checkpoint runs/base --then runs/sr64 --prompt "red heart"

| variant | what it is | parameters of the UNet |
|---|---|---|
| if_base, if_sr256 | DeepFloyd IF's stages I and II of size L, 64 and 256 pixels | 935,365,830; 1,243,277,190 |
| base64 | Imagen's base of 64 pixels, which the paper says has 2B parameters | 2,305,382,403 |
| sr256 | its Efficient U-Net of 64 to 256 pixels | 487,087,491 |
| sr1024 | that of 256 to 1024 pixels, trained on crops of 256 | 482,887,043 |
| openmoji_base | 16 pixels, which trains a T5 of 918,784 parameters with it | 1,279,142 |
| openmoji_sr64 | 16 to 64 pixels, with the T5 of openmoji_base, which learns no more | 2,848,614 |
| openmoji_sr128 | 64 to 128 pixels, the same UNet, trained on crops of 64 pixels | 2,848,614 |

Those of OpenMoji are for two CPU cores. The others take a frozen T5 from --config.task.components, the folder of a
model that has it, e.g. DeepFloyd/IF-I-L-v1.0, and data from --config.data.source. A model that enlarges is trained on
small images with noise of a random level, which it is conditioned on, and all drop a tenth of the captions.

Imagen's rows differ from the paper (Saharia et al. 2022): a thousand steps of noise stand for continuous time, the
base normalises its text in groups, and T5 runs in every step, frozen. The paper's totals of the networks that enlarge,
600M and 400M, are not those of any one reading of its figures.

None of them has been trained to its end yet; the tiny ones are, in the tests.

RUN/export is a folder that diffusers' IFPipeline and IFSuperResolutionPipeline load, but for Imagen's; those of
OpenMoji take embeddings of 16 tokens (`prompt_embeds`), where diffusers encodes 77. `_tiny` after a name is for the
tests.
"""

from configs.common import base, locked
from sdjax.core.config import Config

COSINE = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "timestep_spacing": "leading",
}
SMALL_HEADS = {"head_width": 16, "cross_dim": 64, "text_dim": 128, "pool_heads": 4}
# name: (UNet, pixels of its images, pixels of the image that it enlarges)
VARIANTS = {
    "if_base": ({"variant": "if_i_l"}, 64, 0),
    "if_sr256": ({"variant": "if_ii_l"}, 256, 64),
    "base64": ({"variant": "imagen_base"}, 64, 0),
    "sr256": ({"variant": "imagen_sr256"}, 256, 64),
    "sr1024": ({"variant": "imagen_sr1024"}, 256, 64),
    "openmoji_base": (
        {"variant": "if_i_m", "channels": (32, 64), "layers": (2, 2), "attention_levels": (1,), **SMALL_HEADS},
        16,
        0,
    ),
    "openmoji_sr64": (
        {
            "variant": "if_ii_m",
            "channels": (32, 32, 64, 96),
            "layers": (1, 1, 1, 2),
            "attention_levels": (3,),
            "embedding_dim": 96,
            "cross_only": True,
            **SMALL_HEADS,
            "cross_dim": 96,
        },
        64,
        16,
    ),
}
IMAGEN = ("base64", "sr256", "sr1024")
CROPS = {"openmoji_sr128": (128, 0.5), "sr1024": (1024, 0.25)}
"""Pixels of the images that crops are taken from, and the crops' share of each side."""
VARIANTS["openmoji_sr128"] = (VARIANTS["openmoji_sr64"][0], 64, 32)


def get_config(arg: str = "openmoji_base") -> Config:
    """arg: a key of VARIANTS, or one with "_tiny" after it."""
    name = arg.removesuffix("_tiny")
    if name not in VARIANTS:
        names = ", ".join(VARIANTS)
        raise ValueError(f"unknown variant {arg!r} of configs/imagen.py; choose one of: {names}; or NAME_tiny")
    config = openmoji(name) if name.startswith("openmoji") else published(name)
    return locked(config if name == arg else tiny(config))


def published(name: str) -> Config:
    """One stage, as large as released ones."""
    unet, size, small = VARIANTS[name]
    config = base()
    config.model = {
        "unet": dict(unet),
        "text_encoders": {"text_encoder": {"variant": "t5_v1_1_xxl"}},
        "tokenizer": "",
        "text_length": 77,
    }
    config.task = {
        "name": "diffusion",
        "conditioning": "text_t5",
        "latents": "encoded",
        "first_stage": "none",
        "components": "",
        "small": small,
        "initial": "",
        "dropout": 0.1,
        "weighting": "simple",
        "timesteps": "uniform",
        "offset_noise": 0.0,
        "export_dtype": "float32",
        "scheduler": {**COSINE, "sample_max_value": 1.0 if small else 1.5},
    }
    config.data.update(source="", size=size, flip=False, degradation="lanczos")
    config.optim.update(learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.0, ema_decay=0.9999)
    config.train.update(steps=2_500_000, batch_size=2048, dtype="bfloat16", frozen_dtype="bfloat16", remat="blocks")
    config.train.update(trainable=("unet",), sample_every=10_000)
    config.sample = {
        "count": 16,
        "columns": 4,
        "sampler": "ddpm",
        "steps": 100,
        "guidance_scale": 4.0 if small else 7.0,
    }
    if name in IMAGEN:
        describe(config)
    if name in CROPS:
        side, share = CROPS[name]
        config.sample.update(size=side)
        config.data.update(crop="random", crop_sides=(share, share))
    return config


def describe(config: Config) -> None:
    """Make a stage Imagen's: noise alone is predicted, thresholds have no cap, and the base has Adafactor."""
    scheduler = config.task.scheduler
    scheduler.update(variance_type="fixed_small", dynamic_thresholding_ratio=0.995, sample_max_value=1e4)
    if config.data.size == 256 and config.model.unet.variant == "imagen_sr1024":
        scheduler.update(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    if not config.task.small:
        config.optim.name = "adafactor"


def openmoji(name: str) -> Config:
    """One stage, small enough for a CPU."""
    config = published(name)
    sizes = {"vocab_size": 2048, "width": 128, "layers": 4, "heads": 4, "head_size": 32, "feed_forward": 256}
    config.model.text_encoders.text_encoder = {"variant": "t5_v1_1_small", **sizes}
    config.model.update(tokenizer="sdjax/assets/openmoji_unigrams", text_length=16)
    config.data.update(source="openmoji")
    config.optim.update(learning_rate=6e-4, schedule="cosine", warmup_steps=100, b2=0.99, ema_decay=0.999)
    config.train.update(dtype="float32", frozen_dtype="float32", remat="none", checkpoint_every=250, sample_every=500)
    config.sample.update(count=8, steps=25, guidance_scale=2.0)
    if not config.task.small:
        config.train.update(steps=4000, batch_size=64, trainable=())
        config.sample.guidance_scale = 3.0
        return config
    config.train.update(steps=1500, batch_size=16)
    config.task.components = "runs/base"
    return config


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    if config.model.unet.variant.startswith("imagen_sr"):
        attention = {"self_attention": (1,), "text_attention": (1,), "heads": 2}
        config.model.unet.update(channels=(32, 64), layers=(1, 1), first=32, **attention, **SMALL_HEADS)
    else:
        config.model.unet.update(channels=(32, 64), layers=(1, 1), attention_levels=(1,), **SMALL_HEADS)
        config.model.unet.embedding_dim = 64
    if "size" in config.sample:
        config.sample.size = 16
    sizes = {"vocab_size": 2048, "width": 128, "layers": 1, "heads": 4, "head_size": 32, "feed_forward": 64}
    config.model.text_encoders.text_encoder = {"variant": "t5_v1_1_small", **sizes}
    config.model.update(tokenizer="sdjax/assets/openmoji_unigrams", text_length=16)
    config.data.update(source="openmoji", size=16)
    config.task.small = 8 if config.task.small else 0
    config.task.components = ""  # a T5 of random numbers
    config.train.update(steps=4, batch_size=8, dtype="float32", frozen_dtype="float32", remat="none")
    config.train.update(sample_every=4, checkpoint_every=2, log_every=1)
    config.sample.update(count=4, columns=2, steps=3)
    return config
