"""ADM's classifiers of noisy images, whose gradient guides diffusion (Dhariwal & Nichol 2021).

    python train.py --config configs/classifiers.py:adm_256 --workdir RUN --config.data.source=tfds:imagenet2012

300,000 steps of 256 images, the learning rate falling to nothing (512 px: 150,000 steps). `openmoji` knows the ten
groups of OpenMoji's images at 32 px and is sized for two CPU cores. `_tiny` after a name is for the tests.
"""

from configs.common import base, locked
from sdjax.core.config import Config

SIZES = {"adm_64": 64, "adm_128": 128, "adm_256": 256, "adm_512": 512, "openmoji": 32}


def get_config(arg: str = "adm_256") -> Config:
    """arg: a key of SIZES, or one with "_tiny" after it."""
    name = arg.removesuffix("_tiny")
    if name not in SIZES:
        names = ", ".join(SIZES)
        raise ValueError(f"unknown variant {arg!r} of configs/classifiers.py; choose one of: {names}; or NAME_tiny")
    config = openmoji() if name == "openmoji" else published(name)
    return locked(config if name == arg else tiny(config))


def published(name: str) -> Config:
    """One of ADM's."""
    config = base()
    config.model.classifier = {"variant": name, "size": SIZES[name], "classes": 1000}
    config.task = {
        "name": "classifier",
        "export_dtype": "float32",
        "scheduler": {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "squaredcos_cap_v2" if name == "adm_64" else "linear",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "epsilon",
        },
    }
    config.data.update(source="", size=SIZES[name], flip=True, crop="adm")
    config.optim.update(learning_rate=3e-4, schedule="cosine", warmup_steps=0, weight_decay=0.05, ema_decay=0.0)
    config.train.update(steps=150_000 if name == "adm_512" else 300_000, batch_size=256, dtype="bfloat16")
    config.sample = {"count": 16, "columns": 8}
    return config


def openmoji() -> Config:
    """Small enough for minutes on a CPU."""
    config = published("adm_64")
    config.model.classifier.update(
        size=32,
        classes=10,
        channels=(32, 64, 128),
        heads=(1, 1, 2),
        attention_levels=(2,),
        layers_per_block=1,
        width=32,
    )
    config.data.update(source="openmoji", size=32, flip=False)
    config.optim.update(learning_rate=1e-3, warmup_steps=50, ema_decay=0.99)
    config.train.update(steps=500, batch_size=32, dtype="float32", sample_every=250, checkpoint_every=250)
    return config


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    config.model.classifier.update(
        size=16, channels=(64, 64), heads=(1, 1), attention_levels=(1,), layers_per_block=1, width=64
    )
    config.data.size = 16
    config.train.update(steps=4, batch_size=8, dtype="float32", sample_every=4, checkpoint_every=2, log_every=1)
    config.sample.update(count=4, columns=2)
    return config
