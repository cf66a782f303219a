"""Fine-tuning of a model that `sdjax.load` opens, on images of one's own: one command, and one to sample.

    python train.py --config configs/finetune.py:checkpoints/openmoji --workdir RUN --config.data.source=folder:PATH
    python sample.py --config configs/finetune.py --checkpoint RUN --prompt "..."

After the colon stands what to begin from: a Hub id, a diffusers folder, a single file, or the workdir of a finished
run. Its sizes, its text encoders, the scale of its latents, its noise schedule, what it predicts and the size of its
images are read from it; every network begins from its weights. It must be conditioned on what the data set has:
captions for Stable Diffusion 1, 2, XL's base and LDM's text model (of a single file of that one, give
--config.model.tokenizer=FOLDER, with BERT's vocab.txt), classes, boxes, label maps, or nothing but images.

What learns is --config.train.trainable, all of the UNet by default; "('unet/*attn2*',)" are its cross-attentions. The
learning rate suits published models; small ones such as checkpoints/openmoji take 1e-4. Latents for prompts are
computed once and kept in memory, 128 KiB an image of 512 pixels: where that is too much, prepare them on disk with the
`_tune` variants of configs/stable_diffusion_training.py.

checkpoints/openmoji is small enough for two CPU cores.
"""

from ml_collections import config_dict

from configs.common import base, locked
from sdjax.core.config import Config


def get_config(arg: str = "checkpoints/openmoji") -> Config:
    """arg: the model to begin from."""
    config = base()
    config.model = {"tokenizer": ""}
    config.task = {
        "name": "diffusion",
        "initial": arg,
        "components": "",
        "text": "tokens",
        "dropout": 0.1,
        "weighting": "simple",
        "timesteps": "uniform",
        "norm": "l2",
        "offset_noise": 0.0,
        "export_dtype": "",  # the checkpoint's
        "neighbours": 20,
        "small": 0,  # pixels of the image that a model of captions enlarges; 0: a quarter of data.size
    }
    config.data.update(size=0, flip=False, degradation="bicubic", holes=(0.05, 0.4))  # size 0: the checkpoint's
    config.optim.update(learning_rate=1e-5, warmup_steps=20, ema_decay=0.99)
    config.train.update(steps=500, batch_size=4, log_every=10, sample_every=100, checkpoint_every=100)
    config.train.trainable = ("unet",)
    config.sample = {
        "checkpoint": arg,
        "prompts": (),  # captions of the data
        "count": 4,
        "columns": 4,
        # None: the checkpoint's
        "sampler": config_dict.placeholder(str),
        "steps": config_dict.placeholder(int),
        "guidance_scale": config_dict.placeholder(float),
    }
    return locked(config)
