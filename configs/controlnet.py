"""Training of a ControlNet for a model that `sdjax.load` opens: one command, and one to sample.

    python train.py --config configs/controlnet.py:MODEL --workdir RUN --config.data.source=folder:PATH
    python sample.py --config configs/controlnet.py:MODEL --controlnet RUN --prompt "..." --control_image HINT

MODEL is a Hub id, a diffusers folder, a single file or the workdir of a finished run; it stays as it is. PATH holds
images with captions and conditioning images: a list with the column conditioning_image (Hugging Face), prompt.json
(Fill50k's lines of source, target, prompt), or folders images/ and conditioning_images/. With
--config.data.control_from=canny the hints are made of the images themselves (lineart, scribble, blur, grey, palette
likewise), and any captioned data will do.

The values are those of the published tutorial (lllyasviel/ControlNet, docs/train.md): Fill50k, 50,000 pairs of 512
pixels for Stable Diffusion 1.5,

    python train.py --config configs/controlnet.py:stable-diffusion-v1-5/stable-diffusion-v1-5 --workdir RUN \\
        --config.data.source=folder:fill50k --config.task.dropout=0

AdamW at 1e-5, batches of 4, about 4,000 steps, 50 minutes on an A100 of 40 GB there. It follows its hint from one step
to the next, between 3,000 and 7,000; larger batches, up to 256, help more than more steps. The paper drops half of the
captions, so that the hint alone must say what is seen (section 3.3): --config.task.dropout, 0.5 here.

--config.train.trainable="('controlnet', 'unet/up_blocks*', 'unet/conv_norm_out', 'unet/conv_out')" lets the decoder
learn, too (a learning rate of 2e-6 is advised); RUN is then the whole model, with the ControlNet in it, and is
sampled with --checkpoint RUN --controlnet RUN. On a mesh the base is sharded like what learns: --config.mesh.fsdp=8.

`openmoji` in place of MODEL colours line drawings with checkpoints/openmoji, on two CPU cores in minutes; results
stand in checkpoints/openmoji_lineart/README.md.
"""

from configs import finetune
from configs.common import locked
from sdjax.core.config import Config

OPENMOJI = "checkpoints/openmoji"


def get_config(arg: str = OPENMOJI) -> Config:
    """arg: the model to begin from; "openmoji" for line drawings of it, "openmoji_tiny" for the tests."""
    config = finetune.get_config(OPENMOJI if arg.startswith("openmoji") else arg).unlock()
    config.model.controlnet = {"zero_hint": True}  # as published; False: the hint is heard from the first step on
    config.task.update(controlnet="", latents="encoded", dropout=0.5, timestep_range=(0, 1000), export_dtype="float32")
    config.data.update(control_from="", flip=False)
    config.optim.update(learning_rate=1e-5, warmup_steps=0, weight_decay=0.01, ema_decay=0.0)
    config.train.update(steps=4000, batch_size=4, log_every=50, sample_every=500, checkpoint_every=500)
    config.train.trainable = ("controlnet",)
    config.sample.count = 4
    config.eval = {"split": "held_out", "images": 16, "steps": 10, "batch_size": 8, "seed": 0}
    return locked(openmoji(config, "tiny" in arg) if arg.startswith("openmoji") else config)


def openmoji(config: Config, tiny: bool) -> Config:
    """Line drawings: noisy timesteps alone, which teach a hint soonest, and a hint's encoder that is heard at once."""
    config.model.controlnet.zero_hint = False
    config.task.update(latents="cached", timestep_range=(400, 1000), export_dtype="float16")
    config.data.source = "openmoji_lines"
    config.optim.update(learning_rate=1e-3, ema_decay=0.0)
    config.train.update(steps=560, batch_size=8, log_every=20, sample_every=140, checkpoint_every=40)
    return config
