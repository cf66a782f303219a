"""Textual inversion (Gal et al. 2022): a new word for what a handful of images show, in a model that stays as it is.

    python train.py --config configs/textual_inversion.py:checkpoints/openmoji --workdir RUN \\
        --config.data.source=pictures:FOLDER --config.task.word="<cat-toy>" --config.task.initializer=toy
    python sample.py --config configs/textual_inversion.py --embedding RUN --prompt "a photo of a <cat-toy>"

After the colon stands the model: a Hub id, a diffusers folder, a single file, or the workdir of a finished run, of
Stable Diffusion 1, 2 or XL (whose two text encoders learn a vector each). FOLDER holds 3 to 5 images without captions;
each is shown under one of the published prompts for an "object" or a "style" (--config.data.prompt; a text of one's own
has {} for the word; "" reads captions, which must have the word in them).

RUN/export holds learned_embeds.safetensors (and learned_embeds_2.safetensors for XL), which diffusers'
`load_textual_inversion` reads, and in webui/ the same for A1111, ComfyUI and kohya's scripts, where the file's name is
the word.

The values are those of diffusers' README: 3000 steps, 4 images a step, a rate of 5e-4 times 4, no clipping, no decay of
averages; the paper has 5e-3 for each image of a step, and 5000 steps. --config.task.vectors=N learns N vectors.
"""

from configs import finetune
from configs.common import locked
from sdjax.core.config import Config


def get_config(arg: str = "checkpoints/openmoji") -> Config:
    """arg: the model to begin from."""
    config = finetune.get_config(arg).unlock()
    config.task.update(word="<new>", initializer="", vectors=1, export="embeddings", dropout=0.0)
    config.data.update(prompt="object", repeats=100, flip=True)
    config.optim.update(learning_rate=2e-3, warmup_steps=0, clip_norm=1e9, ema_decay=0.0)
    config.train.update(steps=3000, batch_size=4, checkpoint_every=500, sample_every=500)
    config.train.trainable = ("text_encoder*/token_embedding/words",)
    return locked(config)
