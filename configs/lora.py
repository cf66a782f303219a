"""LoRA of a model that `sdjax.load` opens: a small file of what was learnt, beside a model that stays as it is.

    python train.py --config configs/lora.py:checkpoints/openmoji --workdir RUN --config.data.source=folder:PATH
    python sample.py --config configs/lora.py --lora RUN --prompt "..."

After the colon stands the base, as in configs/finetune.py: Stable Diffusion 1, 2 or XL. RUN/export holds the factors in
diffusers' naming and in kohya's, which other programs read, and a card.

| recipe | what differs from this config |
|---|---|
| diffusers, SD 1 and XL | nothing: rank 4, attention of the UNet, learning rate 1e-4, 500 steps |
| diffusers with text encoders | targets ("attention", "text_attention"), and their own rate: |
| | --config.optim.components="{'text_encoder': {'learning_rate': 5e-6}}" |
| kohya-ss/sd-scripts | targets ("attention", "feed_forward", "projections", "text_attention", "text_feed_forward"), |
| | alpha 1, init "kaiming", 1,600 steps |
| LoCon | beside kohya's "convolutions", and conv_rank |
| published models in little memory | --config.train.frozen_dtype=bfloat16 --config.train.dtype=bfloat16 |
| | --config.train.remat=blocks |

The learning rate suits published models; checkpoints/openmoji takes 2e-3. C-LoRA (Smith et al. 2024) learns concepts
one after another in the keys and values of cross-attention, each in a run of its own, whose penalty guards those
before:

    --config.task.lora.targets="('unet/*/attn2/to_[kv]',)" --config.task.lora.past="('RUN_1','RUN_2')"
    --config.task.lora.forgetting=1e6

A model with all of them is the base with `--lora RUN_1 --lora RUN_2 --lora RUN_3`. The weight depends on the size of
what was learnt before; `openmoji_concept` in place of the base has one for checkpoints/openmoji, on two CPU cores in
minutes; results stand in docs/results.md.
"""

from configs import finetune
from configs.common import locked
from sdjax.core.config import Config

OPENMOJI, CONCEPT = "checkpoints/openmoji", "openmoji_concept"


def get_config(arg: str = OPENMOJI) -> Config:
    """arg: the base; "openmoji_concept" for one of several concepts of checkpoints/openmoji."""
    config = finetune.get_config(OPENMOJI if arg == CONCEPT else arg).unlock()
    config.task.lora = {
        "targets": ("attention",),
        "rank": 4,
        "alpha": 0.0,  # 0: the rank, as for the next two
        "conv_rank": 0,
        "conv_alpha": 0.0,
        "rslora": False,
        "dora": False,
        "dropout": 0.0,
        "init": "gaussian",
        "past": (),
        "forgetting": 0.0,
    }
    config.task.export_dtype = "float32"
    config.optim.update(learning_rate=1e-4, warmup_steps=0, ema_decay=0.0)
    config.train.trainable = ()  # the factors
    return locked(concept(config) if arg == CONCEPT else config)


def concept(config: Config) -> Config:
    """Colours, which are learnt at the noisy timesteps."""
    config.task.lora.update(targets=("unet/*/attn2/to_[kv]",), rank=16, forgetting=1.0)
    config.task.update(dropout=0.0, timestep_range=(300, 1000))
    config.data.source = "openmoji_recoloured:brg:zork"
    config.optim.update(learning_rate=6e-3)
    config.train.update(steps=100, batch_size=8, sample_every=0)
    return config
