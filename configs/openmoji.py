"""A small Stable Diffusion on OpenMoji: 3,743 captioned images of 128 px, sized for two CPU cores.

    python train.py --config configs/openmoji.py --workdir runs/openmoji

trains the autoencoder first (in runs/openmoji/first_stage, from `configs/openmoji.py:autoencoder`), then the UNet and
the text encoder together. A step of the second stage takes about
a second there. Results stand in checkpoints/openmoji/README.md; images of one's own
need less from there on (configs/finetune.py). `:tiny` is for the tests.
"""

from configs.common import SCALED_LINEAR, autoencoder_task, base, locked
from sdjax.core.config import Config

CHECKPOINT = "checkpoints/openmoji"
CLIP = "checkpoints/openmoji_clip"  # that judges, too
# Of the tokenizer in that folder.
VOCABULARY, TOKENS, END_OF_TEXT = 2048, 77, 2047


def get_config(arg: str = "") -> Config:
    """arg: "" for the model, "autoencoder" for its first stage; "tiny" or "autoencoder_tiny" for the tests."""
    makers = {
        "": text_to_image,
        "autoencoder": autoencoder,
        "tiny": lambda: tiny(text_to_image()),
        "autoencoder_tiny": lambda: tiny(autoencoder()),
    }
    if arg not in makers:
        raise ValueError(f"unknown variant {arg!r} of configs/openmoji.py; choose one of: {', '.join(makers)}")
    return locked(makers[arg]())


def autoencoder() -> Config:
    """128 px images to 16x16 latents of 16 channels."""
    config = base()
    config.model.autoencoder = {
        "variant": "kl_f8",
        "channels": (8, 16, 32, 64),
        "latent_channels": 16,
        "layers_per_block": 1,
        "groups": 8,
    }
    config.task = autoencoder_task(reconstruction="l2", crop=64, noiseless_start=True, perceptual_weight=0.0)
    config.data.source = "openmoji"
    config.optim.update(name="muon", learning_rate=0.03, schedule="cosine", warmup_steps=50, weight_decay=0.0, b2=0.99)
    config.optim.ema_decay = 0.99
    config.train.update(steps=2500, batch_size=16, sample_every=500, checkpoint_every=500)
    return config


def text_to_image() -> Config:
    """The UNet and the text encoder."""
    config = base()
    config.model.unet = {
        "variant": "sd1",
        "in_channels": 16,
        "out_channels": 16,
        "context_dim": 192,
        "channels": (64, 160, 224),
        "depths": (0, 1, 1),
        "mid_depth": 1,
        "heads": (2, 5, 7),
        "layers_per_block": 1,
    }
    config.model.text_encoders = {
        "text_encoder": {
            "variant": "clip_l",
            "vocab_size": VOCABULARY,
            "max_length": TOKENS,
            "eos_token_id": END_OF_TEXT,
            "width": 192,
            "layers": 2,
            "heads": 4,
            "feed_forward": 768,
            "activation": "gelu",
        }
    }
    config.model.tokenizer = f"{CHECKPOINT}/tokenizer"
    config.task = {
        "name": "diffusion",
        "conditioning": "text",
        "latents": "cached",
        "text": "tokens",
        "first_stage": "configs/openmoji.py:autoencoder",
        "initial": "",
        "dropout": 0.1,
        "weighting": "simple",
        "timesteps": "late",
        "offset_noise": 0.0,
        "export_dtype": "float16",
        "scheduler": {
            **SCALED_LINEAR,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "steps_offset": 0,
        },
    }
    config.data.source = "openmoji"
    config.optim.update(learning_rate=1e-3, schedule="cosine", warmup_steps=200, b2=0.99, ema_decay=0.999)
    config.train.update(steps=12000, batch_size=32, sample_every=500, checkpoint_every=250)
    config.sample = {
        "checkpoint": CHECKPOINT,
        "prompts": (),  # captions of the data
        "columns": 4,
        "sampler": "ddim",
        "steps": 25,
        "guidance_scale": 2.5,
    }
    config.eval = {"held_out": "held_out", "captions": 512, "batch_size": 64, "seed": 0, "clip": CLIP}
    return config


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    config.data.size = 32
    config.train.update(steps=4, batch_size=8, sample_every=4, checkpoint_every=2, log_every=1)
    config.optim.warmup_steps = 1
    if config.task.name == "autoencoder":
        config.model.autoencoder.update(channels=(8, 16), latent_channels=4)
        config.task.crop = 16
        return config
    config.task.first_stage = "configs/openmoji.py:autoencoder_tiny"
    config.model.unet.update(channels=(32, 64), depths=(0, 1), heads=(2, 2))
    config.model.unet.update(in_channels=4, out_channels=4, context_dim=32)
    config.model.text_encoders.text_encoder.update(width=32, layers=1, heads=2, feed_forward=64)
    config.sample.update(prompts=("red heart", "blue heart"), steps=2)
    return config
