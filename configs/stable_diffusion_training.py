"""Stable Diffusion 1, 2 and XL: the published training runs, and full fine-tuning of what they left.

    CONFIG=configs/stable_diffusion_training.py:sdxl
    python -m sdjax.prepare --config $CONFIG --outdir DATA --config.data.source=webdataset:PATTERN
    python train.py --config $CONFIG --workdir RUN --config.data.prepared=DATA

The first writes latents and text embeddings once, the second trains; both may run on all hosts of a cluster
(docs/cluster.md). A stage goes on from the one before it: --config.task.initial=RUN_BEFORE/export.

| variant | the published run (model cards; Podell et al. 2023, section 2) |
|---|---|
| sd1_256 | v1-1, first part: 237,000 steps at 256 px, batch 2048 on 256 A100, learning rate 1e-4 after 10,000 steps |
| sd1 | v1-3 on: 512 px, 10 % of the captions dropped; 195,000 and 225,000 steps; 150,000 A100 hours for all of SD 1 |
| sd2_256, sd2 | 2.0-base: 550,000 steps at 256 px, then 850,000 at 512 |
| sd2_v | 2.0: 150,000 steps at 512 px and 140,000 at 768 with v-prediction |
| sd2_zero | as sd2_v with a terminal SNR of zero (Lin et al. 2024) and min-SNR weights (Hang et al. 2023) |
| sdxl_256, sdxl_512 | 600,000 and 200,000 steps, batch 2048, conditioned on size and crop |
| sdxl | then about 1024 x 1024 px in buckets of aspect, offset noise 0.05 |
| sd1_tune, sd2_tune, sdxl_tune | all of the UNet from the published weights, batch 64, learning rate 1e-5 |

Where a paper is silent (SDXL's learning rate, its optimiser), SD 1's stand here; the 100,000 steps of `sdxl` and all
of fine-tuning are this project's own choice. `_tiny` after sd1, sd2_zero and sdxl
are for the tests: the same system, small, with text encoders and autoencoder drawn at random.
"""

from configs.common import SCALED_LINEAR, base, locked
from sdjax.core.config import Config

FAMILIES = {
    "sd1": {
        "components": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "unet": {"variant": "sd1"},
        "autoencoder": {"variant": "sd"},
        "text_encoders": {"text_encoder": {"variant": "clip_l"}},
    },
    "sd2": {
        "components": "stabilityai/stable-diffusion-2-1-base",
        "unet": {"variant": "sd2"},
        "autoencoder": {"variant": "sd"},
        "text_encoders": {"text_encoder": {"variant": "openclip_h_sd2"}},
    },
    "sdxl": {
        "components": "stabilityai/stable-diffusion-xl-base-1.0",
        "unet": {"variant": "sdxl"},
        "autoencoder": {"variant": "sdxl"},
        "text_encoders": {"text_encoder": {"variant": "clip_l"}, "text_encoder_2": {"variant": "openclip_bigg"}},
    },
}
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
ZERO = {**V, "rescale_betas_zero_snr": True}
# name: (family, pixels, steps, what else differs, by section)
STAGES = {
    "sd1_256": ("sd1", 256, 237_000, {}),
    "sd1": ("sd1", 512, 420_000, {}),
    "sd2_256": ("sd2", 256, 550_000, {}),
    "sd2": ("sd2", 512, 850_000, {}),
    "sd2_v": ("sd2", 768, 140_000, {"scheduler": V}),
    "sd2_zero": ("sd2", 768, 140_000, {"scheduler": ZERO, "task": {"weighting": "min_snr"}}),
    "sdxl_256": ("sdxl", 256, 600_000, {}),
    "sdxl_512": ("sdxl", 512, 200_000, {}),
    "sdxl": ("sdxl", 1024, 100_000, {"data": {"buckets": "aspect"}, "task": {"offset_noise": 0.05}}),
}
TUNED = {"sd1_tune": "sd1", "sd2_tune": "sd2", "sdxl_tune": "sdxl"}
TINY = {"sd1_tiny": "sd1", "sd2_zero_tiny": "sd2_zero", "sdxl_tiny": "sdxl"}


def get_config(arg: str = "sd1") -> Config:
    """arg: a key of STAGES, TUNED or TINY."""
    if arg in STAGES:
        return locked(stage(arg))
    if arg in TUNED:
        return locked(tuned(stage(TUNED[arg])))
    if arg in TINY:
        return locked(tiny(stage(TINY[arg])))
    names = ", ".join((*STAGES, *TUNED, *TINY))
    raise ValueError(f"unknown variant {arg!r} of configs/stable_diffusion_training.py; choose one of: {names}")


def stage(name: str) -> Config:
    """One of the published runs."""
    family, size, steps, rest = STAGES[name]
    networks = FAMILIES[family]
    config = base()
    config.model = {part: networks[part] for part in ("unet", "autoencoder", "text_encoders")}
    config.task = {
        "name": "diffusion",
        "conditioning": "text",
        "latents": "prepared",
        "text": "prepared",
        "components": networks["components"],
        "initial": "",
        "dropout": 0.1,
        "weighting": "simple",
        "timesteps": "uniform",
        "offset_noise": 0.0,
        "export_dtype": "float16",
        "scheduler": {
            **SCALED_LINEAR,
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "rescale_betas_zero_snr": False,
            **rest.get("scheduler", {}),
        },
        **rest.get("task", {}),
    }
    config.data.update(
        {
            "prepared": "",
            "size": size,
            "buckets": "square",
            "bucket_step": 64,
            "crop": "random",
            "rows_per_shard": 1024,
            **rest.get("data", {}),
        }
    )
    config.optim.update(learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01, ema_decay=0.9999)
    config.train.update(steps=steps, batch_size=2048, dtype="bfloat16", remat="scanned", sample_every=5000)
    config.train.trainable = ("unet",)
    config.mesh.update(data=-1, fsdp=8)
    config.sample = {
        "prompts": ("a red heart", "a lighthouse at dusk", "a cat on a bicycle", "an astronaut in a garden"),
        "columns": 2,
        "sampler": "ddim",
        "steps": 50,
        "guidance_scale": 7.5,
    }
    return config


def tuned(config: Config) -> Config:
    """All of the UNet, from published weights."""
    config.task.initial = config.task.components
    config.optim.update(learning_rate=1e-5, warmup_steps=500)
    config.train.update(steps=10_000, batch_size=64, sample_every=500, checkpoint_every=500)
    return config


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    width, encoders = 0, config.model.text_encoders
    for encoder in encoders.values():
        encoder.update(width=16, layers=2, heads=2, feed_forward=32)
        width += 16
    pooled = "text_encoder_2" in encoders
    if pooled:
        encoders.text_encoder_2.projection_dim = 16
    depths, mid = ((0, 1), 1) if pooled else ((1, 0), 1)
    config.model.unet.update(channels=(32, 64), depths=depths, mid_depth=mid, heads=(2, 4), context_dim=width)
    config.model.unet.update(layers_per_block=1, groups=8, vector_dim=16 + 6 * 256 if pooled else None)
    config.model.autoencoder.update(channels=(8, 16), layers_per_block=1, groups=4)
    config.task.components = ""
    config.data.update(size=32, bucket_step=16, rows_per_shard=8)
    config.optim.warmup_steps = 1
    config.mesh.fsdp = 1
    config.train.update(steps=4, batch_size=8, dtype="float32", sample_every=4, checkpoint_every=2, log_every=1)
    config.sample.update(prompts=("a red heart", "a blue heart"), steps=2)
    return config
