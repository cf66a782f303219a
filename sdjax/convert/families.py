"""The families of single-file checkpoints: what tells them apart, and what their files leave unsaid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sdjax.convert.sizes import Heads
from sdjax.core.errors import UserError, unknown

UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "sample": "sample",
}
_SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
_FINAL = {"clip_sample": False, "set_alpha_to_one": False}


class Family(NamedTuple):
    """One kind of single file.

    Attributes:
        title: its name in messages.
        prefixes: where the text encoders are; OpenCLIP's prefixes end in ".model.".
        heads: of the UNet.
        scheduler: as in the published diffusers folder of the family.
        size: side in pixels of the pictures it was trained on.
        v_size: that side for models that predict v, where it is another.
        unet: what else its config.json says; `vae` likewise.
    """

    title: str
    prefixes: Mapping[str, str]
    heads: Heads
    scheduler: Mapping[str, Any]
    scaling_factor: float
    size: int
    v_size: int | None = None
    unet: Mapping[str, Any] = {}
    vae: Mapping[str, Any] = {}
    low_res_scheduler: Mapping[str, Any] | None = None


_DDIM = {"_class_name": "DDIMScheduler", **_SD, **_FINAL}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_SD, "timestep_spacing": "leading", "use_karras_sigmas": False}
_LOW_RES = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FAMILIES: dict[str, Family] = {
    "sd1": Family(
        title="Stable Diffusion 1",
        prefixes={"text_encoder": "cond_stage_model.transformer."},
        heads=Heads(8),
        scheduler={"_class_name": "PNDMScheduler", **_SD, "set_alpha_to_one": False, "skip_prk_steps": True},
        scaling_factor=0.18215,
        size=512,
    ),
    "sd2": Family(
        title="Stable Diffusion 2",
        prefixes={"text_encoder": "cond_stage_model.model."},
        heads=Heads(),
        scheduler=_DDIM,
        scaling_factor=0.18215,
        size=512,
        v_size=768,
        unet={"upcast_attention": True},
    ),
    "sdxl": Family(
        title="SDXL",
        prefixes={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        heads=Heads(),
        scheduler=_EULER,
        scaling_factor=0.13025,
        size=1024,
        vae={"force_upcast": True},
    ),
    "sdxl_refiner": Family(
        title="the refiner of SDXL",
        prefixes={"text_encoder_2": "conditioner.embedders.0.model."},
        heads=Heads(),
        scheduler=_EULER,
        scaling_factor=0.13025,
        size=1024,
        vae={"force_upcast": True},
    ),
    "x4_upscaler": Family(
        title="Stable Diffusion's x4 upscaler",
        prefixes={"text_encoder": "cond_stage_model.model."},
        heads=Heads(8),
        scheduler={**_DDIM, **_LOW_RES},
        scaling_factor=0.08333,
        size=512,
        low_res_scheduler={
            "_class_name": "DDPMScheduler",
            **_LOW_RES,
            "clip_sample": True,
            "prediction_type": "epsilon",
            "variance_type": "fixed_small",
        },
    ),
}

# What published files hold beside the networks that are read.
SKIPPED = (
    r"model_ema\..*",  # averaged weights under other names; files for sampling hold them as the weights themselves
    r"(low_(scale|res)_model\.)?(betas|alphas_cumprod(_prev)?|(sqrt_|log_|lvlb_|posterior_)\w+|logvar|scale_factor)",
    r"denoiser\.sigmas",
    r"depth_model\..*",  # the depth model's own estimator, MiDaS
    r"(first_stage_model\.)?loss\..*",
    r"(cond_stage_model|conditioner)\..*(position_ids|logit_scale|attn_mask)",
    r"(cond_stage_model|conditioner)\.(embedders\.\d\.)?model\.visual\..*",
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?",
    r"embedding_manager\..*",
    r"(optimizer|lr_scheduler|callbacks)\..*",
    r"v_pred|ztsnr|global_step|epoch|iteration|num_updates",
)

# The first sign that is found says what a file looks like.
_WITHIN = r"(model\.diffusion_model\.|diffusion_model\.)?"
SIGNS: tuple[tuple[str, str], ...] = (
    (r"(lora_(unet|te\d?|transformer)_.*|.*\.lora_(A|B|up|down)\..*|.*\.hada_w1_a|.*\.lokr_w1.*)", "a LoRA"),
    (r"(control_model\..*|controlnet_.*|input_hint_block\..*)", "a ControlNet"),
    (r"(emb_params|string_to_param.*|clip_[lg])", "a textual-inversion embedding"),
    (r".*motion_modules\..*", "AnimateDiff"),
    (r".*\.(time_stack|time_mixer)\..*", "Stable Video Diffusion"),
    (_WITHIN + r"double_blocks\..*", "Flux"),
    (_WITHIN + r"joint_blocks\..*", "Stable Diffusion 3"),
    (_WITHIN + r"double_layers\..*", "AuraFlow"),
    (r"(clip_txt_mapper|clip_txt_pooled_mapper|down_blocks\.\d\.0\.channelwise)\..*", "Stable Cascade"),
    (r"edm_(mean|std)", "Playground 2.5"),
    (r"edm_vpred\..*", "CosXL"),
    (
        r"cond_stage_model\.(transformer\.)?(token_emb|attn_layers|pos_emb)\..*",
        "a text model of the LDM paper, which sdjax.load_conditional reads",
    ),
    (r"(embedder|noise_augmentor)\..*", "Stable Diffusion 2 unCLIP"),
    (r"(first_stage_model\.)?quantize\..*", "a model with a vector-quantised autoencoder"),
    (r"(encoder|shared|decoder)\.(block|embed_tokens)\..*|shared\.weight", "a T5 text encoder"),
    (r"(down_blocks|up_blocks|mid_block|time_embedding)\..*", "a UNet of a diffusers folder; give the folder"),
    (r"(text_model|transformer\.text_model)\..*", "a text encoder alone"),
)


def find_family(keys: Iterable[str], in_channels: int | None, asked: str | None, place: object) -> str:
    """The family of a file.

    Args:
        keys: of its tensors.
        in_channels: of its UNet; None where it has no such key.
        asked: the family that the user names, which wins.

    Raises:
        UserError: it is of none, and says what it looks like; or `asked` is no family.
    """
    if asked is not None and asked not in FAMILIES:
        raise unknown("family", asked, FAMILIES)
    keys = list(keys)
    foreign = None if asked else _looks_like(keys)
    if foreign is not None or in_channels is None or not any(key.startswith(VAE) for key in keys):
        what = f"it looks like {foreign}" if foreign else "it lacks a UNet, or an autoencoder, under their names"
        raise UserError(f"{place} is no checkpoint of a family that is read ({', '.join(FAMILIES)}); {what}")
    if asked is not None:
        return asked
    if in_channels not in (4, 5, 7, 9):
        raise UserError(f"{place}: a UNet with {in_channels} input channels (instruct-pix2pix has 8) is not supported")
    for name in ("sdxl", "sdxl_refiner", "x4_upscaler", "sd2", "sd1"):
        if name == "x4_upscaler" and in_channels != 7:
            continue
        if all(any(key.startswith(prefix) for key in keys) for prefix in FAMILIES[name].prefixes.values()):
            return name
    raise UserError(f"{place} has a UNet and an autoencoder, but no text encoder under a known name")


def _looks_like(keys: list[str]) -> str | None:
    return next((title for sign, title in SIGNS for key in keys if re.fullmatch(sign, key)), None)


def find_prediction(
    family: str, keys: Iterable[str], facts: Mapping[str, str], in_channels: int, asked: str | None
) -> tuple[str, str]:
    """What the network predicts, and why that is believed.

    Stable Diffusion 2's base and v models differ in nothing but their weights: the number of training steps tells the
    first base model (875000), and without it v is assumed, as in diffusers.

    Raises:
        UserError: `asked` is no prediction type.
    """
    if asked is not None:
        if asked not in PREDICTIONS:
            raise unknown("prediction", asked, PREDICTIONS)
        return PREDICTIONS[asked], "as asked"
    said = facts.get("modelspec.prediction_type", "").lower()
    if said in PREDICTIONS:
        return PREDICTIONS[said], "the file's metadata say so"
    if {"v_pred", "ztsnr"} & set(keys):
        return "v_prediction", "the file is marked so"
    if family == "x4_upscaler":
        return "v_prediction", "the family's own"
    if family != "sd2" or in_channels != 4:
        return "epsilon", "the family's own"
    architecture = facts.get("modelspec.architecture", "")
    if "v2-512" in architecture:
        return "epsilon", f"the file's metadata say {architecture}"
    if facts.get("global_step") == "875000":
        return "epsilon", "875000 training steps are those of the base model"
    return "v_prediction", "assumed: SD 2 files do not say; give the prediction for a base model of 512 pixels"


def scheduler_config(family: str, prediction: str, keys: Iterable[str]) -> dict[str, Any]:
    """The scheduler's config; models trained to a terminal SNR of zero are sampled from the last timestep."""
    config = {**FAMILIES[family].scheduler, "prediction_type": prediction}
    if "ztsnr" in set(keys):
        if config["_class_name"] == "PNDMScheduler":  # which has no such option
            config = {**_DDIM, "prediction_type": prediction}
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
