"""DreamBooth (Ruiz et al. 2023): a model learns what a handful of images show, and keeps what it knows of their class.

    python train.py --config configs/dreambooth.py:checkpoints/openmoji --workdir RUN \\
        --config.data.source=pictures:DOG --config.data.prompt="a photo of sks dog" \\
        --config.data.class_folder=DOGS --config.data.class_prompt="a photo of dog"
    python sample.py --config configs/dreambooth.py --checkpoint RUN --prompt "a photo of sks dog in a bucket"

After the colon stands the model: a Hub id, a diffusers folder, a single file, or the workdir of a finished run, of
Stable Diffusion 1, 2 or XL. DOG holds a few images, which all have the one prompt, with a rare word ("sks") before the
class; DOGS holds images of the class, and the untouched model generates what is missing of --config.data.class_images
with --config.sample's sampler; no file there is written over. Without a class_folder nothing preserves the class.

| recipe | base | rate | steps | class images | batch | --config.train.trainable |
|---|---|---|---|---|---|---|
| diffusers README, these values | SD 1 | 5e-6 | 800 | 200 | 1 + 1 | ("unet",) |
| diffusers, no prior | SD 1 | 5e-6 | 400 | none | 1 | ("unet",) |
| diffusers, with its text encoder | SD 1 | 2e-6 | 800 | 200 | 1 + 1 | ("unet", "text_encoder") |
| XavierXiao/Dreambooth-Stable-Diffusion | SD 1 | 1e-6 | 800 | 100 | 1 + 1 | ("unet", "text_encoder") |

LoRA in place of the UNet, as in configs/lora.py, at diffusers' rate for 500 steps:

    --config.task.lora.targets="('attention',)" --config.optim.learning_rate=1e-4

The optimiser is AdamW at a constant rate, without averages; crops are random (--config.data.crop=centre with
--config.task.latents=cached encodes each image once). Small models such as checkpoints/openmoji take 1e-4.
"""

from ml_collections import config_dict

from configs import finetune, lora
from configs.common import locked
from sdjax.core.config import Config


def get_config(arg: str = "checkpoints/openmoji") -> Config:
    """arg: the model to begin from."""
    config = finetune.get_config(arg).unlock()
    config.task.update(latents="encoded", prior_weight=1.0, dropout=0.0)
    config.task.lora = {**lora.get_config(arg).task.lora.to_dict(), "targets": ()}
    config.data.update(prompt="", repeats=1, crop="random", class_folder="", class_prompt="", class_images=200)
    config.optim.update(learning_rate=5e-6, warmup_steps=0, ema_decay=0.0)
    config.train.update(steps=800, batch_size=1, checkpoint_every=200, sample_every=200)
    config.train.trainable = config_dict.placeholder(tuple)  # None: the UNet, or the factors of its LoRA
    config.sample.steps = 50
    return locked(config)
