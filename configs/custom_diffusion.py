"""Custom Diffusion (Kumari et al. 2023): a new word, and the keys and values by which a UNet reads it.

    python train.py --config configs/custom_diffusion.py:checkpoints/openmoji --workdir RUN \\
        --config.data.source=pictures:CAT --config.data.prompt="photo of a <new1> cat" \\
        --config.data.class_folder=CATS --config.data.class_prompt=cat
    python sample.py --config configs/custom_diffusion.py --custom_diffusion RUN --embedding RUN \\
        --prompt "<new1> cat in a bucket"

It is configs/dreambooth.py with other parameters, which says what CAT and CATS are. Several concepts at once are
--config.task.word="<new1>+<new2>" with --config.task.initializer="ktn+pll", and instead of a prompt captions, e.g. in
folders: folder:PATH with PATH/1_photo of a <new1> cat/ and PATH/1_photo of a <new2> dog/.

RUN/export holds pytorch_custom_diffusion_weights.safetensors and <new1>.safetensors, as diffusers' script writes them.
The values are its README's for one concept on two GPUs: 250 steps of 2 images each, a rate of 1e-5 times the 4 images
of a step; 500 steps for two concepts, and 1000 steps at 5e-6 for faces. SD 1 learns 19,169,280 weights, and with
--config.train.trainable="('unet/*attn2/*', 'text_encoder*/token_embedding/words')" queries and outputs, too. Images are
not scaled at random, as the script does.
"""

from configs import dreambooth
from configs.common import locked
from sdjax.core.config import Config


def get_config(arg: str = "checkpoints/openmoji") -> Config:
    """arg: the model to begin from."""
    config = dreambooth.get_config(arg).unlock()
    config.task.update(word="<new1>", initializer="ktn", vectors=1, export="custom_diffusion")
    config.optim.learning_rate = 4e-5
    config.train.update(steps=250, batch_size=4, checkpoint_every=250, sample_every=250)
    config.train.trainable = ("unet/*attn2/to_[kv]", "text_encoder*/token_embedding/words")
    config.data.repeats = 100
    return locked(config)
