"""model_index.json: which kind of model a folder holds, and what diffusers' pipeline of it is made of.

Where diffusers has a pipeline for a kind, it loads the folder. What is needed here besides stands under "_sdjax", which
diffusers passes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.convert import autoencoder, clip, unet, unet2d
from sdjax.convert.components import CONDITIONERS, FORMATS, TOKENIZERS, Checkpoint
from sdjax.convert.tokenizers import BERT
from sdjax.core.errors import UserError, unknown
from sdjax.models.autoencoder import VQConfig
from sdjax.models.unet2d import UNet2DConfig

INDEX = "model_index.json"
WRITER = "_writer"  # diffusers keeps and passes over keys of the index that begin with an underscore
OWN = "_sdjax"
DIFFUSERS_VERSION = "0.42.0"  # the version whose layout this is
OTHER_NETWORKS = ("transformer", "text_encoder_3", "controlnet", "prior_prior", "motion_adapter", "movq", "vqvae")
FIRST_STAGE = "vqvae"  # the name of an autoencoder in diffusers' pipelines of LDM's models

PLAIN, XL, REFINER, INPAINTING, XL_INPAINTING, DEPTH, UPSCALER = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionUpscalePipeline",
)
# Parts of diffusers' pipelines that are not here. Each is written as absent; diffusers asks for those of the depth
# model when it loads: from_pretrained(folder, depth_estimator=..., feature_extractor=...).
_SAFETY = ("feature_extractor", "image_encoder", "safety_checker")
ABSENT: dict[str, tuple[str, ...]] = {
    PLAIN: _SAFETY,
    INPAINTING: _SAFETY,
    **dict.fromkeys((XL, REFINER, XL_INPAINTING), ("feature_extractor", "image_encoder")),
    DEPTH: ("depth_estimator", "feature_extractor"),
    UPSCALER: ("feature_extractor", "safety_checker", "watermarker"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"requires_safety_checker": False},
    INPAINTING: {"requires_safety_checker": False},
    XL: {"force_zeros_for_empty_prompt": True},
    REFINER: {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}
# The pipelines of diffusers that run LDM's other models, by what these are conditioned on.
LDM_PIPELINES = {
    "unconditional": "LDMPipeline",
    "super_resolution": "LDMSuperResolutionPipeline",
    "text_bert": "LDMTextToImagePipeline",
}
LDM_OURS, PIXEL_OURS = "LatentDiffusion", "PixelDiffusion"  # for models that diffusers has no pipeline or class for
PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline")


STABLE_DIFFUSION, LDM, PIXELS = "stable_diffusion", "ldm", "pixels"
# The classes by which each kind of folder is known; Stable Diffusion's is what none of these names.
PIPELINES = {LDM: {LDM_OURS, *LDM_PIPELINES.values()}, PIXELS: {PIXEL_OURS, *PIXEL_PIPELINES}}
COMPONENTS = {STABLE_DIFFUSION: tuple(FORMATS), LDM: ("unet", "vae", *CONDITIONERS), PIXELS: ("unet",)}
TOKENIZER_FOLDERS = {**TOKENIZERS, BERT: "tokenizer"}


def folder_of(component: str, kind: str) -> str:
    """The name of a network's folder."""
    return FIRST_STAGE if (component, kind) == ("vae", LDM) else component


def kind_of_index(index: Mapping[str, Any]) -> str:
    """The kind of a folder with this index: a key of `COMPONENTS`."""
    return next((kind for kind, names in PIPELINES.items() if index.get("_class_name") in names), STABLE_DIFFUSION)


def kind_of_checkpoint(checkpoint: Checkpoint) -> str:
    """The kind of folder that holds a checkpoint."""
    if checkpoint.conditioning == "text":
        return STABLE_DIFFUSION
    return LDM if "vae" in checkpoint.components else PIXELS


def components_in(index: Mapping[str, Any], place: object) -> list[str]:
    """The components that an index lists.

    Raises:
        UserError: it lists a network that is not here, or lacks one.
    """
    kind = kind_of_index(index)
    folders = {part: folder_of(part, kind) for part in COMPONENTS[kind]}
    other = [part for part in OTHER_NETWORKS if present(index, part) and part not in folders.values()]
    if other:
        raise UserError(
            f"{place} lists {other[0]} ({index.get('_class_name')}); folders of Stable Diffusion 1, 2 and XL, which "
            "have none, are read"
        )
    required = [folders[part] for part in ("unet", "vae") if part in folders]
    missing = [part for part in (*required, "scheduler") if not present(index, part)]
    if not missing and kind == STABLE_DIFFUSION and not any(present(index, part) for part in TOKENIZERS):
        missing = ["text_encoder"]
    if missing:
        raise UserError(f"{place} lists no {missing[0]} ({index.get('_class_name')})")
    return [part for part, folder in folders.items() if present(index, folder)]


def present(index: Mapping[str, Any], name: str) -> bool:
    """Whether an index lists a part."""
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def settings_in(index: Mapping[str, Any], place: object) -> tuple[dict[str, Any], str]:
    """A checkpoint's settings, and its conditioning, "" for a model of pixels, whose UNet says it.

    Raises:
        UserError: they are no JSON object, or there is no conditioning.
    """
    own = index.get(OWN, {})
    if not isinstance(own, dict):
        raise UserError(f"{OWN} in {place} is no JSON object")
    kind = kind_of_index(index)
    if kind != LDM:
        return own, "text" if kind == STABLE_DIFFUSION else ""
    named = {pipeline: conditioning for conditioning, pipeline in LDM_PIPELINES.items()}
    conditioning = own.get("task", named.get(index["_class_name"]))
    if not isinstance(conditioning, str):
        raise unknown("pipeline", index["_class_name"], LDM_PIPELINES.values(), str(place))
    return {key: value for key, value in own.items() if key != "task"}, conditioning


def extras_in(index: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that are neither a component ([library, class], or two nulls) nor of those that are written anew."""
    ours = (WRITER, OWN, "_diffusers_version", "_name_or_path")
    return {key: value for key, value in index.items() if not isinstance(value, list) and key not in ours}


def pixel_conditioning(config: Any, place: object) -> str:
    """What a UNet that makes images of images is conditioned on: "class_conditional" or "unconditional".

    Raises:
        UserError: it has cross-attention, or other channels than 3 in, and 3 or 6 out.
    """
    if not isinstance(config, UNet2DConfig) or config.in_channels != 3 or config.out_channels not in (3, 6):
        raise UserError(f"{place} is no UNet of pictures without cross-attention, of 3 channels in and 3 or 6 out")
    return "unconditional" if config.classes is None else "class_conditional"


def pipeline_class(checkpoint: Checkpoint) -> str:
    """The class that runs a checkpoint: what its index says, else what its networks are made for."""
    named, kind = checkpoint.model_index.get("_class_name"), kind_of_checkpoint(checkpoint)
    if isinstance(named, str):
        return named
    sizes = checkpoint.components["unet"].config
    if kind != STABLE_DIFFUSION:
        theirs = not isinstance(sizes, UNet2DConfig) or unet2d.is_diffusers(sizes)
        if kind == PIXELS:
            return PIXEL_PIPELINES[0] if theirs else PIXEL_OURS
        if checkpoint.conditioning == "super_resolution" and checkpoint.components["vae"].config.scaling_factor != 1.0:
            return LDM_OURS  # diffusers' pipeline would not divide the latents by it
        return LDM_PIPELINES.get(checkpoint.conditioning, LDM_OURS) if theirs else LDM_OURS
    if checkpoint.low_res_scheduler is not None:
        return UPSCALER
    masked = sizes.in_channels == 9
    if "text_encoder_2" in checkpoint.components:
        return XL_INPAINTING if masked else XL if "text_encoder" in checkpoint.components else REFINER
    return INPAINTING if masked else DEPTH if sizes.in_channels == 5 else PLAIN


def absent_parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Parts of diffusers' pipeline of Stable Diffusion that are not written, e.g. ("depth_estimator", ...)."""
    return ABSENT.get(pipeline_class(checkpoint), ABSENT[PLAIN])


def schedulers_of(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """The config of each scheduler, by its folder.

    Raises:
        UserError: one does not name its class.
    """
    found = {"scheduler": checkpoint.scheduler}
    if checkpoint.low_res_scheduler is not None:
        found["low_res_scheduler"] = checkpoint.low_res_scheduler
    for name, config in found.items():
        if not isinstance(config.get("_class_name"), str):
            raise UserError(f"the {name} config has no _class_name; it has {', '.join(config)}")
    return found


def index_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model_index.json of a checkpoint.

    Raises:
        UserError: as `schedulers_of`.
    """
    pipeline, kind = pipeline_class(checkpoint), kind_of_checkpoint(checkpoint)
    index: dict[str, Any] = {}
    if kind == STABLE_DIFFUSION:
        index |= {part: [None, None] for part in absent_parts(checkpoint)}
        if pipeline in (XL, REFINER, XL_INPAINTING):
            index |= {part: [None, None] for part in (*TOKENIZERS, *TOKENIZERS.values())}
        index |= {**SETTINGS.get(pipeline, {}), **checkpoint.model_index}
        index |= {"_diffusers_version": DIFFUSERS_VERSION, WRITER: "sdjax"}
    index["_class_name"] = pipeline
    own = {"task": checkpoint.conditioning} if kind == LDM else {}
    if own := {**own, **checkpoint.settings}:
        index[OWN] = own
    for part, config in schedulers_of(checkpoint).items():
        index[part] = ["diffusers", config["_class_name"]]
    for part, component in checkpoint.components.items():
        index[folder_of(part, kind)] = _class_of(part, component.config, pipeline)
    for encoder in checkpoint.tokenizers:
        index[TOKENIZER_FOLDERS[encoder]] = ["transformers", "BertTokenizer" if encoder == BERT else "CLIPTokenizer"]
    return index


def _class_of(name: str, config: Any, pipeline: str) -> list[str]:
    """The library and the class of a network: those of diffusers, where it has them."""
    if name == "unet":
        if not isinstance(config, UNet2DConfig):
            return ["diffusers", unet.CLASS_NAME]
        if unet2d.is_diffusers(config):
            return ["diffusers", unet2d.CLASS_NAME]
        return [PIXEL_OURS if pipeline == PIXEL_OURS else "diffusers", unet2d.OWN_CLASS_NAME]
    if name == "vae":
        return ["diffusers", autoencoder.VQ_CLASS_NAME if isinstance(config, VQConfig) else autoencoder.CLASS_NAME]
    if name in TOKENIZERS:
        return ["transformers", clip.PLAIN if config.projection_dim is None else clip.PROJECTED]
    # diffusers defines its LDM text encoder beside the pipeline
    ours = {"class_embedder": [LDM_OURS, "ClassEmbedder"], "rescaler": [LDM_OURS, "SpatialRescaler"]}
    return {BERT: ["latent_diffusion", "LDMBertModel"], **ours}[name]
