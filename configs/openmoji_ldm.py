"""Every condition of the LDM paper on OpenMoji, over a first stage of f = 4, sized for two CPU cores.

    python train.py --config configs/openmoji_ldm.py:classes --workdir runs/openmoji_classes

trains the first stage first (in WORKDIR/first_stage, from `configs/autoencoders.py:openmoji_kl`; give a finished one by
--config.task.first_stage=FOLDER), then the model. What they reach, and with which commands, stands in docs/results.md.

| variant | condition | pixels |
|---|---|---|
| unconditional | nothing | 64 |
| classes | one of ten groups of emoji | 64 |
| captions | words, through a small BERT | 64 |
| layout | boxes of coloured shapes | 32 |
| regions | which colour of the palette fills each pixel | 64 |
| super_resolution | the image at 32 px | 128 |
| inpainting | the image with holes | 64 |

`_tiny` after a name is for the tests.
"""

from configs import ldm
from configs.common import locked
from sdjax.core.config import Config

# name: (the paper's counterpart, the data, pixels)
VARIANTS = {
    "unconditional": ("celebahq", "openmoji", 64),
    "classes": ("cin256", "openmoji", 64),
    "captions": ("text_f4", "openmoji", 64),
    "layout": ("layout", "openmoji_scenes", 32),
    "regions": ("semantic", "openmoji_regions", 64),
    "super_resolution": ("super_resolution", "openmoji", 128),
    "inpainting": ("inpainting", "openmoji", 64),
}
# Of `sdjax.data.sources.openmoji_parts`: groups, shapes of scenes, colours of the palette.
GROUPS, SHAPES, COLORS = 10, 21, 28
FIRST_STAGE = "configs/autoencoders.py:openmoji_kl"


def get_config(arg: str = "classes") -> Config:
    """arg: a key of VARIANTS, or one with "_tiny" after it."""
    name = arg.removesuffix("_tiny")
    if name not in VARIANTS:
        names = ", ".join(VARIANTS)
        raise ValueError(f"unknown variant {arg!r} of configs/openmoji_ldm.py; choose one of: {names}; or NAME_tiny")
    config = small(name) if name == arg else of_openmoji(ldm.tiny(ldm.published(recipe(name)), recipe(name)), name)
    return locked(config)


def recipe(name: str) -> ldm.Recipe:
    """The paper's, over KL latents, with the schedule of Stable Diffusion."""
    return ldm.RECIPES[VARIANTS[name][0]]._replace(autoencoder="openmoji_kl", betas=(0.00085, 0.012))


def small(name: str) -> Config:
    """Sizes and hyper-parameters for minutes on a CPU."""
    config = of_openmoji(ldm.published(recipe(name)), name)
    side = VARIANTS[name][2]
    config.task.first_stage = FIRST_STAGE
    config.task.scheduler.update(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0)
    config.data.size = side
    config.model.unet.update(channels=(64, 128, 192), heads=(2, 4, 6), layers_per_block=1)
    if config.task.conditioning in ldm.SELF_ATTENDING:
        config.model.unet.update(attention_levels=(1, 2), resblock_updown=False)
    else:
        config.model.unet.update(depths=(0, 1, 1), mid_depth=1)
    if config.task.conditioning in ("text_bert", "layout"):
        config.model.unet.context_dim = 128
        config.model.bert.update(width=128, layers=2, heads=2, max_length=32)
    if config.task.conditioning == "class_conditional":
        config.model.unet.context_dim = config.model.class_embedder.width = 128
    config.optim.update(
        learning_rate=1e-3, schedule="cosine", final_fraction=0.0, warmup_steps=100, b2=0.99, ema_decay=0.995
    )
    config.train.update(steps=800, batch_size=16, dtype="float32", sample_every=400, checkpoint_every=200)
    if name == "super_resolution":  # four times as many latents
        config.model.unet.update(channels=(32, 64, 128), heads=(1, 2, 4))
        config.train.update(steps=1200, batch_size=8)
    elif name == "layout":  # places are seen from near by
        config.model.unet.depths = (1, 1, 1)
        config.model.bert.max_length = 11  # three objects and the crop: of 32 tokens most would say nothing
        config.task.timesteps = "late"  # in little noise the image itself says where things are
        config.train.steps = 4000
    config.sample.update(count=16, columns=8, steps=25)
    return config


def of_openmoji(config: Config, name: str) -> Config:
    """Settings that the data determines."""
    config.data.update(source=VARIANTS[name][1], flip=False, crop="centre", crop_sides=(1.0, 1.0))
    config.model.unet.update(
        in_channels=3 + {"inpainting": 4}.get(name, 3 if config.task.conditioning in CONCATENATING else 0)
    )
    if name == "classes":
        config.model.class_embedder.classes = GROUPS
    elif name == "layout":
        config.task.update(classes=SHAPES, dropout=0.1)
        config.sample.guidance_scale = 2.0
        config.model.bert.vocab_size = 64  # a grid of 8 x 8 points, each of which is seen often enough
    elif name == "captions":
        config.model.bert.vocab_size = 4096
        config.model.tokenizer = "sdjax/assets/openmoji_words"
    elif name == "regions":
        config.model.rescaler.classes = COLORS
    elif name == "super_resolution":
        config.data.degradation = "bicubic"
    elif name == "inpainting":
        config.data.holes = (0.05, 0.4)
    return config


CONCATENATING = ("super_resolution", "semantic_synthesis")
