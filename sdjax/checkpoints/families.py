"""The published kinds of single files: what tells them apart, and what their tensors do not say.

Stable Diffusion's family; the LDM paper's released models (CompVis/latent-diffusion models/*/config.yaml and configs/);
ADM's (openai/guided-diffusion, the flags in its README).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from sdjax.checkpoints.kinds import LDM, PIXELS, STABLE_DIFFUSION
from sdjax.checkpoints.mapping import Shapes, Stored
from sdjax.checkpoints.networks import unet2d
from sdjax.checkpoints.original_keys import Heads
from sdjax.core.errors import UserError, unknown

T = TypeVar("T")
Claims: TypeAlias = Sequence[tuple[str | None, str]]
UNET, VAE, COND = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST, POOL = "input_blocks.0.0.weight", "out.2.positional_embedding"
SGM, VECTOR = "conditioner.embedders.0.", "label_emb.0.0.weight"
PROJECTION = "middle_block.1.proj_in.weight"
# The last attention's norm: a spread of its bias above 0.09 marks Stable Diffusion 2's models of v (ComfyUI, SD20).
LAST_BIAS, SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
BERT_WORDS = f"{COND}transformer.token_emb.weight"
CLASSES, RESCALER = f"{COND}embedding.weight", f"{COND}channel_mapper.weight"
# A text encoder of Stable Diffusion's.
CLIP = re.compile(r"conditioner\.|cond_stage_model\.(model\.|transformer\.(text_model|embeddings|encoder)\.)")
WORDS = 30522  # of BERT's vocabulary
RETRIEVED = 16  # channels of the latents of retrieval-augmented models, whose condition has no network
PREDICTIONS = {
    **{"epsilon": "epsilon", "eps": "epsilon", "sample": "sample"},
    **dict.fromkeys(("v", "v_prediction", "v-prediction"), "v_prediction"),
}
ONE_STEP = re.compile(r"1step(_unet)?_x0", re.IGNORECASE)  # the names of SDXL-Lightning's files that predict x0


class Family(NamedTuple):
    """One kind of file.

    Attributes:
        kind: of checkpoint.
        heads: of the UNet.
        scheduler: scheduler_config.json, but for `prediction_type`.
        size: side in pixels of the images it was trained on.
        scaling_factor: of the latents, where the file does not say it.
        conditioning: of the checkpoint; "" for models of pixels, whose UNet says it.
        settings: of the checkpoint.
        latent_channels: of LDM's models, which they and the condition tell apart.
        blocks: levels of ADM's UNet and residual blocks of each, by which it is known.
        new_order: of queries, keys and values in ADM's UNet: those of all heads together, not of each head.
        title: Stable Diffusion's name in messages.
        prefixes: of its text encoders; OpenCLIP's end in ".model.".
        linear: whether the projections around the UNet's transformers are matrices, not convolutions.
        v_size: the size for models that predict v, where it is another.
        unet: what else its config.json says; `vae` likewise.
    """

    kind: str
    heads: Heads
    scheduler: Mapping[str, Any]
    size: int
    scaling_factor: float = 1.0
    conditioning: str = "text"
    settings: Mapping[str, Any] = {}
    latent_channels: int = 4
    blocks: tuple[int, int] = (0, 0)
    new_order: bool = False
    title: str = ""
    prefixes: Mapping[str, str] = {}
    linear: bool = True
    v_size: int | None = None
    unet: Mapping[str, Any] = {}
    vae: Mapping[str, Any] = {}
    low_res_scheduler: Mapping[str, Any] | None = None


_BETAS = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_SD = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_PNDM = {"_class_name": "PNDMScheduler", **_SD, "set_alpha_to_one": False, "skip_prk_steps": True}
_DDIM = {"_class_name": "DDIMScheduler", **_SD, "clip_sample": False, "set_alpha_to_one": False}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_SD, "timestep_spacing": "leading", "use_karras_sigmas": False}
_LOW_RES = {**_BETAS, "beta_start": 0.0001, "beta_end": 0.02}
_LOW_RES_DDPM = {"_class_name": "DDPMScheduler", **_LOW_RES, "clip_sample": True, "prediction_type": "epsilon"}
NARROW, OPEN_CLIP = Heads(width=32), {"text_encoder": f"{COND}model."}
REFINER = {"text_encoder_2": "conditioner.embedders.0.model."}
SDXL = {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}


def _sd(
    title: str,
    heads: Heads,
    scheduler: Mapping[str, Any],
    size: int,
    scaling_factor: float,
    prefixes: Mapping[str, str],
    **rest: Any,
) -> Family:
    return Family(STABLE_DIFFUSION, heads, scheduler, size, scaling_factor, title=title, prefixes=prefixes, **rest)


def _ldm(
    conditioning: str,
    latent_channels: int,
    heads: Heads,
    betas: tuple[float, float] = (0.0015, 0.0195),
    scaling_factor: float = 1.0,
    size: int = 256,
    **settings: float,
) -> Family:
    """A model of the LDM paper, of the first and the last of its betas; `settings` say how it is sampled."""
    scheduler = {**_DDIM, "beta_start": betas[0], "beta_end": betas[1]}
    settings = {"size": size, **settings}
    return Family(LDM, heads, scheduler, size, scaling_factor, conditioning, settings, latent_channels)


def _adm(size: int, levels: int, heads: Heads, layers: int = 2, schedule: str = "linear") -> Family:
    """A model of ADM's; `schedule` is diffusers' name of the noise schedule."""
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": schedule,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "variance_type": "learned_range",
        "clip_sample": True,
        "timestep_spacing": "linspace",  # of `timestep_respacing` 250; for "ddim25" give the schedule "leading"
    }
    return Family(PIXELS, heads, scheduler, size, conditioning="", blocks=(levels, layers))


FAMILIES: dict[str, Family] = {
    "sd1": _sd(
        "Stable Diffusion 1", Heads(8), _PNDM, 512, 0.18215, {"text_encoder": f"{COND}transformer."}, linear=False
    ),
    "sd2": _sd(
        "Stable Diffusion 2", Heads(), _DDIM, 512, 0.18215, OPEN_CLIP, v_size=768, unet={"upcast_attention": True}
    ),
    "sdxl": _sd("SDXL", Heads(), _EULER, 1024, 0.13025, SDXL, vae={"force_upcast": True}),
    "sdxl_refiner": _sd("the refiner of SDXL", Heads(), _EULER, 1024, 0.13025, REFINER, vae={"force_upcast": True}),
    "x4_upscaler": _sd(
        "Stable Diffusion's x4 upscaler",
        Heads(8),
        {**_DDIM, **_LOW_RES},
        512,
        0.08333,
        OPEN_CLIP,
        low_res_scheduler={**_LOW_RES_DDPM, "variance_type": "fixed_small"},
    ),
    "celebahq": _ldm("unconditional", 3, NARROW),  # and FFHQ's, and LSUN bedrooms'
    "lsun_churches": _ldm("unconditional", 4, Heads(8), (0.0015, 0.0155)),
    "cin256": _ldm("class_conditional", 3, Heads(1), steps=20, guidance_scale=3.0),
    "cin_f8": _ldm("class_conditional", 4, NARROW),
    "text": _ldm("text_bert", 4, Heads(8), (0.00085, 0.012), 0.18215, steps=200, guidance_scale=5.0),
    "text_f4": _ldm("text_bert", 3, NARROW, guidance_scale=1.5),
    "layout": _ldm("layout", 3, NARROW, (0.0015, 0.0205)),
    "super_resolution": _ldm("super_resolution", 3, NARROW, (0.0015, 0.0155), steps=100),
    "inpainting": _ldm("inpainting", 3, Heads(8), (0.0015, 0.0205)),
    "rdm": _ldm("retrieval", RETRIEVED, NARROW, (0.0015, 0.015), 0.22765929, 768, guidance_scale=5.0),
    "semantic": _ldm("semantic_synthesis", 3, Heads(8), (0.0015, 0.0205)),
    "adm_64": _adm(64, 4, Heads(), 3, "squaredcos_cap_v2")._replace(new_order=True),
    "adm_128": _adm(128, 5, Heads(4)),
    "adm_256": _adm(256, 6, Heads()),
    "adm_512": _adm(512, 7, Heads()),
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
    r"cond_stage_model\.transformer\.to_logits\..*",  # of a language model, which nobody trained LDM's encoder as
    r"embedding_manager\..*",
    r"(optimizer|lr_scheduler|callbacks)\..*",
    r"v_pred|ztsnr|global_step|epoch|iteration|num_updates",
)

# Numbers that the stored weights are multiplied by, of quantised files (ComfyUI's and bitsandbytes').
SCALES = (
    r".*(scaled_fp8|(weight|input)_scale(_2)?|scale_(weight|input)|comfy_quant|absmax|quant_map|quant_state.*|\.SCB)"
)


class Sign(NamedTuple):
    """Keys that tell what a file looks like; the first sign that is found does.

    Attributes:
        keys: regular expression of a whole key.
        title: in messages.
        addition: whether a whole model stays what it is with such keys beside its own.
    """

    keys: str
    title: str
    addition: bool = False


_WITHIN = r"(model\.diffusion_model\.|diffusion_model\.)?"
_LORA = r"(lora_(unet|te\d?|transformer)_.*|.*\.lora_(A|B|up|down)\..*|.*\.hada_w1_a|.*\.lokr_w1.*)"
SIGNS = (
    Sign(_LORA, "a LoRA", True),
    Sign(r"(control_model\..*|controlnet_.*|input_hint_block\..*)", "a ControlNet"),
    Sign(r"(emb_params|string_to_param.*|clip_[lg])", "a textual-inversion embedding", True),
    Sign(r".*motion_modules\..*", "AnimateDiff"),
    Sign(r".*\.(time_stack|time_mixer)\..*", "Stable Video Diffusion"),
    Sign(_WITHIN + r"double_blocks\..*", "Flux"),
    Sign(_WITHIN + r"joint_blocks\..*", "Stable Diffusion 3"),
    Sign(_WITHIN + r"double_layers\..*", "AuraFlow"),
    Sign(r"(clip_txt_mapper|clip_txt_pooled_mapper|down_blocks\.\d\.0\.channelwise)\..*", "Stable Cascade"),
    Sign(r"edm_(mean|std)", "Playground 2.5"),
    Sign(r"edm_vpred\..*", "CosXL"),
    Sign(
        r"cond_stage_model\.(transformer\.)?(token_emb|attn_layers|pos_emb)\..*",
        "part of a text model of the LDM paper",
    ),
    Sign(r"(embedder|noise_augmentor)\..*", "Stable Diffusion 2 unCLIP"),
    Sign(r"(first_stage_model\.)?quantize\..*", "a model with a vector-quantised autoencoder"),
    Sign(r"(encoder|shared|decoder)\.(block|embed_tokens)\..*|shared\.weight", "a T5 text encoder", True),
    Sign(
        r"(down_blocks|up_blocks|mid_block|time_embedding)\..*", "a UNet of a diffusers folder; give the folder", True
    ),
    Sign(r"(text_model|transformer\.text_model)\..*", "a text encoder alone", True),
)


def with_ldm_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors under LDM's names where a file has those of its successor (sgm), as sd_turbo's has.

    There one prefix is of several families; a UNet without a vector, as SDXL's and its refiner's take it, is of LDM's.
    """
    if f"{UNET}{VECTOR}" in tensors:
        return dict(tensors)
    return {re.sub(f"^{re.escape(SGM)}", COND, key): tensor for key, tensor in tensors.items()}


def kind_of_shapes(shapes: Shapes) -> str:
    """The kind of a file; Stable Diffusion's is what is none of the others."""
    if {FIRST, "time_embed.0.weight", "middle_block.1.qkv.weight"} <= set(shapes):
        return PIXELS
    if not all(any(key.startswith(prefix) for key in shapes) for prefix in (UNET, VAE)):
        return STABLE_DIFFUSION
    crossed = any(".transformer_blocks." in key for key in shapes)
    marked = any(key in shapes for key in (CLASSES, RESCALER, BERT_WORDS)) or _latents(shapes) == RETRIEVED
    return LDM if (marked or not crossed) and not any(CLIP.match(key) for key in shapes) else STABLE_DIFFUSION


def find_family(shapes: Shapes, requested: str | None, place: object, optional: Collection[str] = ()) -> str:
    """The family of a file.

    Args:
        shapes: of its tensors, by key.
        requested: the family that the user names, which wins over others of the file's kind.
        optional: components that it may lack, as in `sdjax.checkpoints.open.read_checkpoint`.

    Raises:
        UserError: it is of none, and the message says what it looks like; or `requested` is none of its kind's.
    """
    kind = kind_of_shapes(shapes)
    names = [name for name, row in FAMILIES.items() if row.kind == kind]
    if requested is not None and requested not in names:
        raise unknown("family", requested, names)
    if kind == STABLE_DIFFUSION:
        return _stable_diffusion(shapes, names, requested, place, optional)
    return requested or (_ldm_family if kind == LDM else _adm_family)(shapes, names, place)


def _stable_diffusion(
    shapes: Shapes, names: Collection[str], requested: str | None, place: object, optional: Collection[str]
) -> str:
    first: tuple[int, ...] = shapes.get(UNET + FIRST, ())
    has_vae = "vae" in optional or any(key.startswith(VAE) for key in shapes)
    is_whole = len(first) >= 2 and has_vae
    signs = [sign for sign in SIGNS if not (is_whole and sign.addition)]
    looks = (sign.title for sign in signs for key in shapes if re.fullmatch(sign.keys, key))
    foreign = None if requested else next(looks, None)
    if foreign is not None or len(first) < 2 or not has_vae:
        lacks = "a UNet under its name" if len(first) < 2 else "an autoencoder; sampling takes another one, --vae"
        what = f"it looks like {foreign}" if foreign else f"it lacks {lacks}"
        raise UserError(f"{place} is no checkpoint of a family that is read ({', '.join(names)}); {what}")
    if requested is not None:
        return requested
    if first[1] not in (4, 5, 7, 9):
        raise UserError(f"{place}: a UNet with {first[1]} input channels (instruct-pix2pix has 8) is not supported")
    for name in ("sdxl", "sdxl_refiner", "x4_upscaler", "sd2", "sd1"):
        prefixes = FAMILIES[name].prefixes.values()
        here = all(any(key.startswith(prefix) for key in shapes) for prefix in prefixes)
        if here and (name != "x4_upscaler" or first[1] == 7):
            _check_projections(shapes, name, place)
            return name
    raise UserError(f"{place} has a UNet, but no text encoder under a known name")


def _check_projections(shapes: Shapes, name: str, place: object) -> None:
    """Holds the UNet to the family that the text encoder's name tells."""
    row, rank = FAMILIES[name], len(shapes.get(UNET + PROJECTION, ()))
    if rank and row.linear != (rank == 2):
        raise UserError(
            f"{place} has a text encoder under the name of {row.title}'s, and a UNet of another family "
            f"({UNET}{PROJECTION} has {rank} axes); give the family whose heads and text encoder it has"
        )


def _latents(shapes: Shapes) -> int | None:
    """Channels of the first stage's latents."""
    return next(iter(shapes.get(f"{VAE}post_quant_conv.weight", ())), None)


def _ldm_family(shapes: Shapes, names: Iterable[str], place: object) -> str:
    latents, first = _latents(shapes), shapes.get(UNET + FIRST, ())
    if latents is None or len(first) < 2:
        raise UserError(f"{place} lacks the first layer of its UNet, or of its first stage's decoder")
    if BERT_WORDS in shapes:
        task = "text_bert" if shapes[BERT_WORDS][0] == WORDS else "layout"
    elif CLASSES in shapes or RESCALER in shapes:
        task = "class_conditional" if CLASSES in shapes else "semantic_synthesis"
    elif any(".transformer_blocks." in key for key in shapes):
        task = "retrieval" if first[1] == latents == RETRIEVED else ""
    else:
        tasks = {0: "unconditional", 3: "super_resolution", latents + 1: "inpainting"}
        task = tasks.get(first[1] - latents, "")
    for name in names:
        if (FAMILIES[name].conditioning, FAMILIES[name].latent_channels) == (task, latents):
            return name
    raise UserError(
        f"{place}: a UNet of {first[1]} channels over latents of {latents} is none of the LDM paper's released "
        f"models ({', '.join(names)}); give the family whose heads and noise schedule it has"
    )


def _adm_family(shapes: Shapes, names: Iterable[str], place: object) -> str:
    found = unet2d.original_config(shapes, Heads(), place)
    structure = (found.scale_shift, found.resblock_updown, found.in_channels, found.out_channels)
    blocks = (len(found.channels), found.layers_per_block)
    for name in names:
        if structure == (True, True, 3, 6) and FAMILIES[name].blocks == blocks:
            return name
    raise UserError(
        f"{place} has a UNet of {blocks[0]} levels of {blocks[1]} blocks, {found.in_channels} channels in and "
        f"{found.out_channels} out, which is none of ADM's ({', '.join(names)}); give the family whose heads and noise "
        "schedule it has"
    )


def find_prediction(
    family: str, tensors: Mapping[str, Stored], facts: Mapping[str, str], in_channels: int, claims: Claims = ()
) -> tuple[str, str]:
    """The network's prediction, and why that is believed.

    Stable Diffusion 2's base and v models differ in nothing but their weights: the number of training steps tells the
    first base model (875000), and the spread of one tensor others. Without it v is assumed, as in diffusers.

    Args:
        claims: what is known from elsewhere, the first of which is believed, and why; None is no claim.

    Raises:
        UserError: a claim is no prediction type.
    """
    for claim, reason in claims:
        if claim is not None:
            if claim not in PREDICTIONS:
                raise unknown("prediction", claim, PREDICTIONS)
            return PREDICTIONS[claim], reason
    said = facts.get("modelspec.prediction_type", "").lower()
    if said in PREDICTIONS:
        return PREDICTIONS[said], "the file's metadata say so"
    if {"v_pred", "ztsnr"} & set(tensors):
        return "v_prediction", "the file is marked so"
    if family != "sd2" or in_channels != 4:
        return "v_prediction" if family == "x4_upscaler" else "epsilon", "the family's own"
    architecture = facts.get("modelspec.architecture", "")
    if "v2-512" in architecture:
        return "epsilon", f"the file's metadata say {architecture}"
    if facts.get("global_step") == "875000":
        return "epsilon", "875000 training steps are those of the base model"
    if (last := f"{UNET}{LAST_BIAS}") in tensors:
        is_wide = np.std(np.asarray(tensors[last]).astype(np.float32)) > SPREAD
        return "v_prediction" if is_wide else "epsilon", f"the {'wide' if is_wide else 'narrow'} spread of {last}"
    return "v_prediction", "assumed: SD 2 files do not say; give the prediction for a base model of 512 pixels"


def scheduler_config(
    family: str, prediction: str, keys: Iterable[str], own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The scheduler's config, `own` entries before the family's.

    Models trained to a terminal SNR of zero are sampled from the last timestep.
    """
    own = {**(own or {}), "prediction_type": prediction}
    config = {**FAMILIES[family].scheduler, **own}
    if "ztsnr" in set(keys):
        if config["_class_name"] == "PNDMScheduler":  # which has no such option
            config = {**_DDIM, **own}
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
