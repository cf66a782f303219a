"""DDPM and ADM on images themselves: noise to pixels, without a first stage.

    python train.py --config configs/pixels.py:adm_256_uncond --workdir RUN --config.data.source=pictures:PATH

| variant | what it is |
|---|---|
| adm_256_uncond | ADM without classes (Dhariwal & Nichol 2021), learned variance |
| iddpm_64 | the 64 px UNet without classes, cosine schedule and learned variance (Nichol & Dhariwal 2021) |
| adm_64, adm_128, adm_256, adm_512 | ADM of ImageNet's classes, published FID 2.07, 2.97, 4.59, 7.72 |
| openmoji | OpenMoji at 32 px, for two CPU cores |

RUN/export is a folder that diffusers' DDPMPipeline loads; of adm_128 and adm_512, whose sizes its class has no words
for, only this project. `_tiny` after a name is for the tests.
"""

from configs.common import base, locked
from sdjax.core.config import Config

# name: (UNet, pixels, noise schedule, classes)
VARIANTS = {
    "adm_256_uncond": ("adm_256_uncond", 256, "linear", None),
    "iddpm_64": ("adm_64", 64, "squaredcos_cap_v2", None),
    "adm_64": ("adm_64", 64, "squaredcos_cap_v2", 1000),
    "adm_128": ("adm_128", 128, "linear", 1000),
    "adm_256": ("adm_256", 256, "linear", 1000),
    "adm_512": ("adm_512", 512, "linear", 1000),
    "openmoji": ("adm_64", 32, "squaredcos_cap_v2", None),
}


def get_config(arg: str = "adm_256_uncond") -> Config:
    """arg: a key of VARIANTS, or one with "_tiny" after it."""
    name = arg.removesuffix("_tiny")
    if name not in VARIANTS:
        names = ", ".join(VARIANTS)
        raise ValueError(f"unknown variant {arg!r} of configs/pixels.py; choose one of: {names}; or NAME_tiny")
    config = openmoji() if name == "openmoji" else published(name)
    return locked(config if name == arg else tiny(config))


def published(name: str) -> Config:
    """One of the papers' models."""
    variant, size, schedule, classes = VARIANTS[name]
    config = base()
    config.model.unet = {"variant": variant, "classes": classes}
    config.task = {
        "name": "diffusion",
        "conditioning": "unconditional" if classes is None else "class_conditional",
        "latents": "encoded",
        "first_stage": "none",
        "initial": "",
        "dropout": 0.0,
        "weighting": "simple",
        "timesteps": "uniform",
        "offset_noise": 0.0,
        "export_dtype": "float32",
        "scheduler": {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": schedule,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "epsilon",
            "variance_type": "learned_range",
            "clip_sample": True,
            "timestep_spacing": "linspace",
        },
    }
    config.data.update(source="", size=size, flip=True, crop="adm")
    config.optim.update(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0, ema_decay=0.9999)
    config.train.update(steps=1_000_000, batch_size=256, dtype="bfloat16", remat="blocks", sample_every=5000)
    config.sample = {"count": 16, "columns": 4, "sampler": "ddpm", "steps": 250}
    return config


def openmoji() -> Config:
    """Small enough for minutes on a CPU."""
    config = published("openmoji")
    config.model.unet.update(channels=(32, 64, 128), heads=(1, 1, 2), attention_levels=(2,), layers_per_block=1)
    config.model.unet.width = 32
    config.data.update(source="openmoji", flip=False)
    config.optim.update(learning_rate=5e-4, schedule="cosine", warmup_steps=100, b2=0.99, ema_decay=0.995)
    config.train.update(steps=800, batch_size=16, dtype="float32", remat="none", checkpoint_every=200)
    config.train.sample_every = 400
    config.sample.steps = 50
    return config


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    config.model.unet.update(channels=(32, 64), heads=(1, 2), attention_levels=(1,), layers_per_block=1, width=32)
    config.data.size = 16
    config.train.update(steps=4, batch_size=8, dtype="float32", remat="none")
    config.train.update(sample_every=4, checkpoint_every=2, log_every=1)
    config.sample.update(count=4, columns=2, steps=3)
    return config
