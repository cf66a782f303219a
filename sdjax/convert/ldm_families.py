"""The LDM paper's released models: what tells them apart, and what their files leave unsaid.

CompVis/latent-diffusion, models/*/config.yaml and configs/; the class embedder of 1001 is that of cin256-v2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.convert.families import UNET, VAE
from sdjax.convert.sizes import Heads
from sdjax.core.errors import UserError, unknown

COND = "cond_stage_model."
BERT, CLASSES, RESCALER = f"{COND}transformer.", f"{COND}embedding.weight", f"{COND}channel_mapper.weight"
# A text encoder of Stable Diffusion's, which other readers read.
ELSEWHERE = re.compile(r"conditioner\.|cond_stage_model\.(model\.|transformer\.(text_model|embeddings|encoder)\.)")
WORDS = 30522  # of BERT's vocabulary
RETRIEVED = 16  # channels of the latents of retrieval-augmented models, whose condition has no network


class LDMFamily(NamedTuple):
    """One released model.

    Attributes:
        task: the file of `sdjax.tasks` that trains such models.
        latent_channels: of its first stage; with the task they tell the models apart.
        heads: of the UNet.
        betas: the first and the last of the noise schedule.
        scaling_factor: of the latents, where the file does not say it.
        sampling: how it is sampled.
    """

    task: str
    latent_channels: int
    heads: Heads
    betas: tuple[float, float] = (0.0015, 0.0195)
    scaling_factor: float = 1.0
    sampling: Mapping[str, Any] = {}

    @property
    def scheduler(self) -> dict[str, Any]:
        """Its scheduler_config.json."""
        return {
            "_class_name": "DDIMScheduler",
            "beta_start": self.betas[0],
            "beta_end": self.betas[1],
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "epsilon",
        }


NARROW = Heads(width=32)
LDM_FAMILIES = {
    "celebahq": LDMFamily("unconditional", 3, NARROW),  # and FFHQ's, and LSUN bedrooms'
    "lsun_churches": LDMFamily("unconditional", 4, Heads(8), (0.0015, 0.0155)),
    "cin256": LDMFamily("class_conditional", 3, Heads(1), sampling={"steps": 20, "guidance_scale": 3.0}),
    "cin_f8": LDMFamily("class_conditional", 4, NARROW),
    "text": LDMFamily("text_bert", 4, Heads(8), (0.00085, 0.012), 0.18215, {"steps": 200, "guidance_scale": 5.0}),
    "text_f4": LDMFamily("text_bert", 3, NARROW, sampling={"guidance_scale": 1.5}),
    "layout": LDMFamily("layout", 3, NARROW, (0.0015, 0.0205)),
    "super_resolution": LDMFamily("super_resolution", 3, NARROW, (0.0015, 0.0155), sampling={"steps": 100}),
    "inpainting": LDMFamily("inpainting", 3, Heads(8), (0.0015, 0.0205)),
    "rdm": LDMFamily("retrieval", 16, NARROW, (0.0015, 0.015), 0.22765929, {"guidance_scale": 5.0, "size": 768}),
    "semantic": LDMFamily("semantic_synthesis", 3, Heads(8), (0.0015, 0.0205)),
}


def is_ldm_file(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file's tensors are those of such a model; of Stable Diffusion's and of others they are not."""
    if not all(any(key.startswith(prefix) for key in shapes) for prefix in (UNET, VAE)):
        return False
    crossed = any(".transformer_blocks." in key for key in shapes)
    told = any(key in (CLASSES, RESCALER, f"{BERT}token_emb.weight") for key in shapes)
    told |= _latents(shapes) == RETRIEVED
    return (told or not crossed) and not any(ELSEWHERE.match(key) for key in shapes)


def find_ldm_family(shapes: Mapping[str, tuple[int, ...]], asked: str | None, place: object) -> str:
    """The family of a file for which `is_ldm_file` holds.

    Raises:
        UserError: `asked` is no family, or there is none of this task and first stage.
    """
    if asked is not None:
        if asked not in LDM_FAMILIES:
            raise unknown("family", asked, LDM_FAMILIES)
        return asked
    latents, first = _latents(shapes), shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    if latents is None or len(first) < 2:
        raise UserError(f"{place} lacks the first layer of its UNet, or of its first stage's decoder")
    inputs = first[1]
    task = _task(shapes, inputs - latents, latents)
    known = {(family.task, family.latent_channels): name for name, family in LDM_FAMILIES.items()}
    if task is None or (task, latents) not in known:
        raise UserError(
            f"{place}: a UNet of {inputs} channels over latents of {latents} is none of the LDM paper's released "
            f"models ({', '.join(LDM_FAMILIES)}); give the family whose heads and noise schedule it has"
        )
    return known[task, latents]


def _latents(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Channels of the first stage's latents."""
    return next(iter(shapes.get(f"{VAE}post_quant_conv.weight", ())), None)


def _task(shapes: Mapping[str, tuple[int, ...]], extra: int, latents: int) -> str | None:
    if f"{BERT}token_emb.weight" in shapes:
        return "text_bert" if shapes[f"{BERT}token_emb.weight"][0] == WORDS else "layout"
    if CLASSES in shapes:
        return "class_conditional"
    if RESCALER in shapes:
        return "semantic_synthesis"
    if any(".transformer_blocks." in key for key in shapes):
        return "retrieval" if latents == RETRIEVED and not extra else None
    return {0: "unconditional", 3: "super_resolution", latents + 1: "inpainting"}.get(extra)
