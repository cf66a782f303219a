"""The models of the LDM paper beside Stable Diffusion (Rombach et al. 2022), with their published hyper-parameters.

    python train.py --config configs/ldm.py:celebahq --workdir RUN --config.task.first_stage=FOLDER \\
        --config.data.source=pictures:PATH

FOLDER is the first stage that the table names: the workdir of a finished run of `configs/autoencoders.py`, or a folder
that has one in FOLDER/vae, as `python -m sdjax.convert` makes of a published model. The learning rates are those of all
images of a batch together.

| variant | condition | first stage | batch, steps | published (FID unless said) |
|---|---|---|---|---|
| celebahq | none | vq_f4 | 48, 410k | 5.11 (500 DDIM steps) |
| ffhq | none | vq_f4 | 42, 635k | 4.98 (200, eta 1) |
| lsun_bedrooms | none | vq_f4 | 48, 1.9M | 2.95 (200, eta 1) |
| lsun_churches | none | kl_f8 | 96, 500k | 4.02 (200) |
| cin_f8 | 1000 classes | vq_f8 | 64, 2M | 15.51 (200 steps, 4.8M steps of training) |
| cin256 | 1000 classes | vq_f4 | 1200, 178k | 10.56; 3.60 guided by 1.5 (250) |
| text | captions, BERT of 582M | kl_f8 | 680, 390k | 12.63 on COCO, guided by 1.5 (250) |
| text_f4 | captions | vq_f4 | 680, 390k | 16.79 on Conceptual Captions |
| layout | boxes of OpenImages | vq_f4 | 24, 4.4M | 32.02 on OpenImages |
| super_resolution | small images, BSR-light | vq_f4 | 64, 860k | 2.8 on ImageNet-val, bicubic, PSNR 24.4 |
| inpainting | images with holes | vq_f4_noattn | 64, 50k | 1.50 (all holes), fine-tuned at 512 px |
| semantic | label maps | vq_f4 | 48, 360k | |
| rdm | CLIP's embeddings of 20 neighbours, 768 px | kl_f16 | 680, 390k | |

The batch of `text_f4` and that of `inpainting`, and how `rdm` was trained, were not published; `text`'s and a guess of
the same size as `super_resolution`'s stand in for them. `_tiny` after a name is for the tests.
"""

from typing import NamedTuple

from configs.common import SCALED_LINEAR, base, locked
from sdjax.core.config import Config


class Recipe(NamedTuple):
    """Recipe of a model.

    Attributes:
        conditioning: of the model.
        unet: its variant.
        betas: the first and the last of the noise schedule.
        batch: images.
        steps: of the optimiser.
        rate: of learning.
        autoencoder: whose tiny variant the tests train over.
        dropout: how often the condition is left out.
        guidance: of sampling.
        norm: of the loss.
        size: pixels.
        warmup: steps of the optimiser.
        schedule: of the learning rate after it.
    """

    conditioning: str
    unet: str
    betas: tuple[float, float]
    batch: int
    steps: int
    rate: float
    autoencoder: str = "vq_f4"
    dropout: float = 0.0
    guidance: float = 1.0
    norm: str = "l2"
    size: int = 256
    warmup: int = 0
    schedule: str = "constant"


USUAL = (0.0015, 0.0195)
RECIPES = {
    "celebahq": Recipe("unconditional", "ldm_celebahq", USUAL, 48, 410_000, 9.6e-5),
    "ffhq": Recipe("unconditional", "ldm_celebahq", USUAL, 42, 635_000, 8.4e-5),
    "lsun_bedrooms": Recipe("unconditional", "ldm_celebahq", USUAL, 48, 1_900_000, 9.6e-5),
    "lsun_churches": Recipe(
        "unconditional", "ldm_churches", (0.0015, 0.0155), 96, 500_000, 5e-5, "kl_f8", norm="l1", warmup=10_000
    ),
    "cin_f8": Recipe("class_conditional", "ldm_cin_f8", USUAL, 64, 2_000_000, 6.4e-5, "vq_f8"),
    "cin256": Recipe("class_conditional", "ldm_cin_f4", USUAL, 1200, 178_000, 1e-4, dropout=0.1, guidance=3.0),
    "text": Recipe("text_bert", "ldm_text", (0.00085, 0.012), 680, 390_000, 1e-4, "kl_f8", 0.1, 5.0),
    "text_f4": Recipe("text_bert", "ldm_text_f4", USUAL, 680, 390_000, 1e-4, dropout=0.1, guidance=1.5),
    "layout": Recipe("layout", "ldm_layout", (0.0015, 0.0205), 24, 4_400_000, 4.8e-5, norm="l1"),
    "super_resolution": Recipe("super_resolution", "ldm_bsr_sr", (0.0015, 0.0155), 64, 860_000, 6.4e-5),
    "inpainting": Recipe(
        "inpainting",
        "ldm_inpainting",
        (0.0015, 0.0205),
        64,
        50_000,
        6.4e-6,
        "vq_f4_noattn",
        norm="l1",
        warmup=1000,
        schedule="cosine",
    ),
    "rdm": Recipe(
        "retrieval", "ldm_rdm", (0.0015, 0.015), 680, 390_000, 1e-4, "kl_f16", dropout=0.1, guidance=5.0, size=768
    ),
    "semantic": Recipe("semantic_synthesis", "ldm_semantic", (0.0015, 0.0205), 48, 360_000, 4.8e-5, norm="l1"),
}
# Conditions whose UNet has no cross-attention.
SELF_ATTENDING = ("unconditional", "super_resolution", "inpainting", "semantic_synthesis")
CLASSES, OBJECT_CLASSES, MAP_CLASSES = 1000, 601, 182


def get_config(arg: str = "celebahq") -> Config:
    """arg: a key of RECIPES, or one with "_tiny" after it."""
    name = arg.removesuffix("_tiny")
    if name not in RECIPES:
        names = ", ".join(RECIPES)
        raise ValueError(f"unknown variant {arg!r} of configs/ldm.py; choose one of: {names}; or NAME_tiny")
    config = published(RECIPES[name])
    return locked(config if name == arg else tiny(config, RECIPES[name]))


def published(recipe: Recipe) -> Config:
    """One of the paper's models."""
    config = base()
    config.model.unet = {"variant": recipe.unet}
    config.task = {
        "name": "diffusion",
        "conditioning": recipe.conditioning,
        "latents": "encoded",
        "first_stage": "",
        "initial": "",
        "dropout": recipe.dropout,
        "weighting": "simple",
        "norm": recipe.norm,
        "timesteps": "uniform",
        "offset_noise": 0.0,
        "export_dtype": "float32",
        "scheduler": {
            **SCALED_LINEAR,
            "beta_start": recipe.betas[0],
            "beta_end": recipe.betas[1],
            "prediction_type": "epsilon",
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    }
    condition(config, recipe)
    config.data.update(source="", size=recipe.size, flip=recipe.conditioning == "unconditional")
    config.optim.update(learning_rate=recipe.rate, warmup_steps=recipe.warmup, schedule=recipe.schedule)
    config.optim.update(ema_decay=0.9999, final_fraction=0.001)
    config.train.update(steps=recipe.steps, batch_size=recipe.batch, dtype="bfloat16", sample_every=5000)
    config.sample = {"count": 8, "columns": 8, "sampler": "ddim", "steps": 50, "guidance_scale": recipe.guidance}
    return config


def condition(config: Config, recipe: Recipe) -> None:
    """Keys that only some conditions read."""
    if recipe.conditioning == "class_conditional":
        config.model.class_embedder = {"classes": CLASSES, "width": 512}
        config.data.update(crop="random", crop_sides=(1.0, 1.0))
    elif recipe.conditioning == "text_bert":
        config.model.bert = {"variant": recipe.unet}
        config.model.tokenizer = ""
    elif recipe.conditioning == "retrieval":
        config.task.neighbours = 20
    elif recipe.conditioning == "layout":
        config.model.bert = {"variant": "ldm_layout"}
        config.task.classes = OBJECT_CLASSES
        config.data.update(crop="random", crop_sides=(0.0, 1.0))
    elif recipe.conditioning == "semantic_synthesis":
        config.model.rescaler = {"classes": MAP_CLASSES}
        config.data.update(crop="random", crop_sides=(256 / 384, 256 / 384))
    elif recipe.conditioning == "super_resolution":
        config.data.update(degradation="bsr_light", crop="random", crop_sides=(0.5, 1.0))
    elif recipe.conditioning == "inpainting":
        config.data.holes = (0.02, 0.5)


def tiny(config: Config, recipe: Recipe) -> Config:
    """The same system, small enough for a test."""
    config.task.first_stage = f"configs/autoencoders.py:{recipe.autoencoder}_tiny"
    config.model.unet.update(channels=(32, 64), heads=(2, 2), layers_per_block=1)
    config.model.unet.update(
        {"attention_levels": (1,)} if recipe.conditioning in SELF_ATTENDING else {"depths": (0, 1)}
    )
    if recipe.conditioning in ("text_bert", "layout"):
        config.model.unet.update(context_dim=32, mid_depth=1)
        config.model.bert.update(width=32, layers=1, heads=1, max_length=32)
    if recipe.conditioning == "retrieval":
        config.model.unet.context_dim, config.task.neighbours = 24, 3
    if recipe.conditioning == "class_conditional":
        config.model.unet.context_dim = config.model.class_embedder.width = 32
    config.data.size = 32
    config.optim.warmup_steps = 0
    config.train.update(steps=4, batch_size=8, dtype="float32", sample_every=4, checkpoint_every=2, log_every=1)
    config.sample.update(count=2, columns=2, steps=3)
    return config
