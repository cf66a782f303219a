"""Pieces that configs share: every section with every key it may have, and the values that suit most."""

from typing import Any

from ml_collections import ConfigDict

from sdjax.core.config import Config

SCALED_LINEAR = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
"""Stable Diffusion's noise schedule, as a scheduler_config.json says it."""


def base() -> Config:
    """A config with the sections `model task data optim mesh train sample eval`; a system's file fills them in."""
    return ConfigDict(
        {
            "model": {},
            "task": {"name": ""},
            "data": {
                "source": "",
                "size": 128,
                "crop": "centre",  # "adm", or "random" squares
                "crop_sides": (1.0, 1.0),  # of random squares, as shares of the shorter side
                "on_bad": "stop",  # at a row that cannot be used, or "skip" it: counted, and listed in the log
                "minimum_side": 0,  # pixels; images with a shorter side are bad
                "links": (),  # folders outside of the data's own that links in it may lead to
                "threads": 8,  # that make batches, each one at a time
                "workers": 0,  # processes with as many threads each, in place of this one's
            },
            "optim": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "schedule": "constant",
                "warmup_steps": 1000,
                "final_fraction": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "ema_decay": 0.9999,
                "components": {},  # name: what differs for this network, which then has an optimiser of its own
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "spatial": 1},
            "train": {
                "steps": 1000,
                "batch_size": 16,
                "accumulate": 1,
                "trainable": (),  # names of parameters, e.g. "unet" or "unet/*attn2*"; () all but the autoencoder's
                "remat": "none",
                "dtype": "float32",
                "frozen_dtype": "float32",  # of the weights that do not learn, but the autoencoder's
                "seed": 0,
                "log_every": 50,  # 0: never, as for the next two
                "sample_every": 1000,
                "checkpoint_every": 1000,  # and at the end, always
                "keep_checkpoints": 2,
                "keep_best": "",  # a metric: as many checkpoints with its lowest means are retained, too
                "restore": "latest",  # "previous" goes back by one where the latest cannot be read
                "profile": "",  # START:STOP, the steps of a trace in workdir/profile
            },
            "sample": {},
            "eval": {},
        }
    )


def autoencoder_task(**changes: Any) -> Config:
    """The `task` section of a first stage, with LDM's weights and without a discriminator."""
    return ConfigDict(
        {
            "name": "autoencoder",
            "reconstruction": "l1",
            "kl_weight": 1e-6,
            "codebook_weight": 1.0,
            "learn_logvar": False,
            "noiseless_start": False,
            "crop": 256,
            "perceptual_weight": 1.0,
            "discriminator": {"weight": 0.0, "start": 50_001, "layers": 3, "width": 64, "criterion": "hinge"},
            **changes,
        }
    )


def locked(config: Config) -> Config:
    """The config, to which no key can be added any more."""
    return config.lock()
