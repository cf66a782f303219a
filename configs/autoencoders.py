"""LDM's first stages: autoencoders with a KL term or a codebook, trained with LPIPS and a patch discriminator.

    python train.py --config configs/autoencoders.py:kl_f8 --workdir RUN --config.data.source=webdataset:PATTERN

LPIPS needs VGG16's weights (vgg16-397923af.pth) in $SDJAX_WEIGHTS or PyTorch's cache; without them a run says so and
goes on without. What the paper trained on is OpenImages; shorter sides of 384 pixels, of which crops of 256 are seen.

| variant | codes x channels | batch | published steps | R-FID | PSNR | LPIPS | SSIM |
|---|---|---|---|---|---|---|---|
| kl_f2 | KL, 2 | 10 | | 0.086 | 32.47 | 0.20 | 0.93 |
| kl_f4 | KL, 3 | 10 | 176,991 | 0.27 | 27.53 | 0.55 | 0.82 |
| kl_f8 | KL, 4 | 4 | 246,803 | 0.90 | 24.19 | 1.02 | 0.69 |
| kl_f16 | KL, 16 | 6 | 442,998 | 0.87 | 24.08 | 1.07 | 0.68 |
| kl_f32 | KL, 64 | 6 | 406,763 | 2.04 | 22.27 | 1.41 | 0.61 |
| vq_f2 | 2048 x 2 | 8 | | 0.16 | 30.85 | 0.27 | 0.91 |
| vq_f4 | 8192 x 3 | 8 | 533,066 | 0.58 | 27.43 | 0.53 | 0.82 |
| vq_f4_noattn | 8192 x 3 | 8 | 658,131 | 1.06 | 25.21 | 0.72 | 0.76 |
| vq_f8 | 16384 x 4 | 10 | 971,043 | 1.14 | 23.07 | 1.17 | 0.65 |
| vq_f8_n256 | 256 x 4 | 10 | 1,608,649 | 1.49 | 22.35 | 1.26 | 0.62 |
| vq_f16 | 16384 x 8 | 14 | 1,101,166 | 5.15 | 20.83 | 1.73 | 0.54 |

(CompVis/latent-diffusion, models/first_stage_models and README; figures: LDM, table 8, on ImageNet-val at 256 px.) The
learning rate is 4.5e-6 an image of the batch for both networks, Adam's betas are 0.5 and 0.9. `kl_f2` and `vq_f2`
were not released; their recipes here are those of f4. `_tiny` after a name is for the tests.

`openmoji_kl` and `openmoji_vq` are first stages of 64 px for two CPU cores; `configs/openmoji_ldm.py` trains over one.
"""

from typing import Any, NamedTuple

from configs.common import autoencoder_task, base, locked
from sdjax.core.config import Config


class FirstStageRecipe(NamedTuple):
    """Recipe of a first stage.

    Attributes:
        batch: images.
        steps: of the optimiser.
        start: the step at which the discriminator begins to count.
        weight: of the discriminator.
        layers: of the discriminator.
    """

    batch: int
    steps: int
    start: int
    weight: float
    layers: int = 3


RECIPES = {
    "kl_f2": FirstStageRecipe(10, 176_991, 50_001, 0.5),
    "kl_f4": FirstStageRecipe(10, 176_991, 50_001, 0.5),
    "kl_f8": FirstStageRecipe(4, 246_803, 50_001, 0.5),
    "kl_f16": FirstStageRecipe(6, 442_998, 50_001, 0.5),
    "kl_f32": FirstStageRecipe(6, 406_763, 50_001, 0.5),
    "vq_f2": FirstStageRecipe(8, 533_066, 0, 0.75),
    "vq_f4": FirstStageRecipe(8, 533_066, 0, 0.75),
    "vq_f4_noattn": FirstStageRecipe(8, 658_131, 11, 0.75),
    "vq_f8": FirstStageRecipe(10, 971_043, 1, 0.6, layers=2),
    "vq_f8_n256": FirstStageRecipe(10, 1_608_649, 250_001, 0.75),
    "vq_f16": FirstStageRecipe(14, 1_101_166, 250_001, 0.75, layers=2),
}
RATE = 4.5e-6
UNCLIPPED = 1e9


def get_config(arg: str = "kl_f8") -> Config:
    """arg: a key of RECIPES, or one of them with "_tiny" after it."""
    name = arg.removesuffix("_tiny")
    if name in OPENMOJI:
        return locked(openmoji(name) if name == arg else tiny(openmoji(name)))
    if name in RECIPES:
        return locked(published(name) if name == arg else tiny(published(name)))
    names = ", ".join((*RECIPES, *OPENMOJI))
    raise ValueError(f"unknown variant {arg!r} of configs/autoencoders.py; choose one of: {names}; or NAME_tiny")


def published(name: str) -> Config:
    """One of the first stages of the paper."""
    recipe, config = RECIPES[name], base()
    config.model.autoencoder = {"variant": name}
    config.task = autoencoder_task()
    config.task.discriminator.update(weight=recipe.weight, start=recipe.start, layers=recipe.layers)
    config.data.size = 384
    config.optim.update(_adam(RATE * recipe.batch))
    config.train.update(steps=recipe.steps, batch_size=recipe.batch, sample_every=5000, checkpoint_every=5000)
    return config


OPENMOJI = {"openmoji_kl": "kl_f4", "openmoji_vq": "vq_f4"}


def openmoji(name: str) -> Config:
    """A small first stage of f = 4. Without LPIPS: it needs a download."""
    config, variant = base(), OPENMOJI[name]
    config.model.autoencoder = {"variant": variant, "channels": (16, 32, 64), "layers_per_block": 1, "groups": 8}
    if variant.startswith("vq"):
        config.model.autoencoder.update(codes=1024)
    config.task = autoencoder_task(perceptual_weight=0.0, crop=64)
    config.task.discriminator.update(weight=0.1, start=1000, layers=2, width=32)
    config.data.update(source="openmoji", size=64)
    config.optim.update(learning_rate=2e-3, schedule="cosine", warmup_steps=50, b1=0.9, b2=0.99, weight_decay=0.0)
    config.optim.update(ema_decay=0.99, components={"discriminator": {"learning_rate": 2e-4, "b1": 0.5}})
    config.train.update(steps=1500, batch_size=8, sample_every=500, checkpoint_every=250)
    return config


def _adam(rate: float) -> dict[str, Any]:
    """Adam for both networks, each by itself, without warm-up or clipping."""
    return {
        "learning_rate": rate,
        "warmup_steps": 0,
        "b1": 0.5,
        "b2": 0.9,
        "weight_decay": 0.0,
        "clip_norm": UNCLIPPED,
        "ema_decay": 0.0,
        "components": {"discriminator": {"learning_rate": rate}},
    }


def tiny(config: Config) -> Config:
    """The same system, small enough for a test."""
    config.data.source = ""
    levels = {"f2": 2, "f4": 3, "f8": 4, "f16": 5, "f32": 6}[config.model.autoencoder.variant.split("_")[1]]
    config.model.autoencoder.update(channels=(8,) * levels, layers_per_block=1, groups=4)
    if config.model.autoencoder.variant.startswith("vq"):
        config.model.autoencoder.codes = 16
    config.data.size = 64
    config.task.crop = 32
    config.task.discriminator.start = 2
    config.task.discriminator.layers = 2
    config.train.update(steps=4, batch_size=8, sample_every=4, checkpoint_every=2, log_every=1)
    return config
