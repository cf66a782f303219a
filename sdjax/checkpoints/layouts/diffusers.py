"""A checkpoint's folder, as diffusers has it: model_index.json, and a folder of each network, scheduler and tokenizer.

Where diffusers has a pipeline for a model, it loads the folder. What is needed here besides stands in the index under
keys with an underscore, which diffusers passes over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.checkpoints.checkpoint import (
    ALL_FORMATS,
    BERT,
    CONDITIONERS,
    FORMATS,
    TOKENIZERS,
    Checkpoint,
    Component,
    Dtypes,
    ReadOptions,
    added_tokens,
    check_text_encoders,
    find_tokenizer,
    pixel_conditioning,
    read_params,
    tokenizer_class,
    write_tokenizer,
)
from sdjax.checkpoints.config_fields import check_sample_size, check_settings
from sdjax.checkpoints.kinds import CAPTIONS, LDM, PIXELS, STABLE_DIFFUSION
from sdjax.checkpoints.mapping import Put, export
from sdjax.checkpoints.networks import autoencoder, clip, t5, unet, unet2d
from sdjax.checkpoints.storage.safetensors import write_json, write_safetensors
from sdjax.checkpoints.storage.weights import find_weights, read_file
from sdjax.core.errors import UserError, unknown
from sdjax.core.files import atomic_write, recover
from sdjax.core.precision import dtype_named
from sdjax.core.untrusted import read_json
from sdjax.models.added_kv_unet import AddedKVUNetConfig
from sdjax.models.autoencoder import VQConfig
from sdjax.models.efficient_unet import EfficientUNetConfig
from sdjax.models.t5 import T5Config
from sdjax.models.unet2d import UNet2DConfig

INDEX = "model_index.json"
WRITER, OWN = "_writer", "_sdjax"
ZEROS = "force_zeros_for_empty_prompt"  # of an index of SDXL's: its null condition is zeros, and no empty prompt
DIFFUSERS_VERSION = "0.42.0"  # the version whose layout this is
OTHER_NETWORKS = ("transformer", "text_encoder_3", "prior_prior", "motion_adapter", "movq", "vqvae")
CONTROLLED = "ControlNet"  # in the names of pipelines of a model and ControlNets
FIRST_STAGE = "vqvae"  # the name of an autoencoder in diffusers' pipelines of LDM's models
COMPONENTS = {
    STABLE_DIFFUSION: tuple(FORMATS),
    LDM: ("unet", "vae", *CONDITIONERS),
    PIXELS: ("unet", "text_encoder"),
}
# The folder that says how an upscaler's small image is noised.
NOISING = {STABLE_DIFFUSION: "low_res_scheduler", LDM: "low_res_scheduler", PIXELS: "image_noising_scheduler"}
TOKENIZER_FOLDERS = {**TOKENIZERS, BERT: "tokenizer"}


class PipelineClass(NamedTuple):
    """A pipeline of diffusers, or a name of our own for models that it has no pipeline or class for.

    Attributes:
        kind: of the checkpoints that it runs.
        conditioning: of LDM's models and of DeepFloyd IF's; "" where the folder says it.
        absent: parts of the pipeline that are not here. Each is written as absent; diffusers asks for those of the
            depth model when it loads: from_pretrained(folder, depth_estimator=..., feature_extractor=...). DeepFloyd
            IF's safety checker and watermark are not here either: images are as the UNet makes them.
        settings: further entries of the index.
    """

    kind: str = STABLE_DIFFUSION
    conditioning: str = ""
    absent: tuple[str, ...] = ("feature_extractor", "image_encoder", "safety_checker")
    settings: Mapping[str, Any] = {}

    @property
    def keeps_index(self) -> bool:
        """True if absent parts and further entries of its index are read and written."""
        return self.kind == STABLE_DIFFUSION or self.conditioning == CAPTIONS


PLAIN, OWN_LDM, OWN_PIXELS = "StableDiffusionPipeline", "LatentDiffusion", "PixelDiffusion"
OWN_CAPTIONS = "CaptionDiffusion"  # pixels of captions, by networks that diffusers has no class for
DDPM, UPSCALER = "DDPMPipeline", "StableDiffusionUpscalePipeline"
IF, IF_UPSCALER = "IFPipeline", "IFSuperResolutionPipeline"
_SAFE, _XL = {"requires_safety_checker": False}, ("feature_extractor", "image_encoder")
# DeepFloyd IF's pipelines of both stages, which differ in what is given beside the prompt.
_IF = (
    *(IF, "IFImg2ImgPipeline", "IFInpaintingPipeline"),
    *(IF_UPSCALER, "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
)
_MARKED = ("feature_extractor", "safety_checker", "watermarker")
_XL_PARTS = (*_XL, *TOKENIZERS, *TOKENIZERS.values())  # the refiner lacks one encoder
PIPELINES: dict[str, PipelineClass] = {
    PLAIN: PipelineClass(settings=_SAFE),
    "StableDiffusionInpaintPipeline": PipelineClass(settings=_SAFE),
    "StableDiffusionDepth2ImgPipeline": PipelineClass(absent=("depth_estimator", "feature_extractor")),
    UPSCALER: PipelineClass(absent=_MARKED),
    "StableDiffusionXLPipeline": PipelineClass(absent=_XL, settings={ZEROS: True}),
    "StableDiffusionXLImg2ImgPipeline": PipelineClass(
        absent=_XL, settings={ZEROS: False, "requires_aesthetics_score": True}
    ),
    "StableDiffusionXLInpaintPipeline": PipelineClass(absent=_XL),
    "LDMPipeline": PipelineClass(LDM, "unconditional"),
    "LDMSuperResolutionPipeline": PipelineClass(LDM, "super_resolution"),
    "LDMTextToImagePipeline": PipelineClass(LDM, "text_bert"),
    OWN_LDM: PipelineClass(LDM),
    DDPM: PipelineClass(PIXELS),
    "DDIMPipeline": PipelineClass(PIXELS),
    OWN_PIXELS: PipelineClass(PIXELS),
    OWN_CAPTIONS: PipelineClass(PIXELS, CAPTIONS, (), {}),
    **dict.fromkeys(_IF, PipelineClass(PIXELS, CAPTIONS, _MARKED, _SAFE)),
}


def class_of_index(index: Mapping[str, Any]) -> PipelineClass:
    """The pipeline that an index names; Stable Diffusion's where it names none that is known."""
    return PIPELINES.get(str(index.get("_class_name")), PIPELINES[PLAIN])


def pipeline_class(checkpoint: Checkpoint) -> str:
    """The class that runs a checkpoint: what its index says, else what its networks are made for."""
    named, sizes = checkpoint.model_index.get("_class_name"), checkpoint.components["unet"].config
    if isinstance(named, str):
        return named
    theirs = not isinstance(sizes, UNet2DConfig) or unet2d.is_diffusers(sizes)
    if isinstance(sizes, EfficientUNetConfig):
        return OWN_CAPTIONS
    if isinstance(sizes, AddedKVUNetConfig):
        return IF if checkpoint.low_res_scheduler is None else IF_UPSCALER
    if checkpoint.kind == PIXELS:
        return DDPM if theirs else OWN_PIXELS
    if checkpoint.kind == LDM:
        if checkpoint.conditioning == "super_resolution" and checkpoint.components["vae"].config.scaling_factor != 1.0:
            return OWN_LDM  # diffusers' pipeline would not divide the latents by it
        known = {row.conditioning: name for name, row in PIPELINES.items() if row.kind == LDM}
        return known.get(checkpoint.conditioning, OWN_LDM) if theirs else OWN_LDM
    if checkpoint.low_res_scheduler is not None:
        return UPSCALER
    xl = "XL" if "text_encoder_2" in checkpoint.components else ""
    if xl and "text_encoder" not in checkpoint.components and sizes.in_channels != 9:
        return "StableDiffusionXLImg2ImgPipeline"
    task = {9: "Inpaint", 5: "" if xl else "Depth2Img"}.get(sizes.in_channels, "")
    return f"StableDiffusion{xl}{task}Pipeline"


def absent_parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Parts of diffusers' pipeline of Stable Diffusion that are not written, e.g. ("depth_estimator", ...)."""
    return class_of_index({"_class_name": pipeline_class(checkpoint)}).absent


def folder_of(component: str, kind: str) -> str:
    """The name of a network's folder."""
    return FIRST_STAGE if (component, kind) == ("vae", LDM) else component


def present(index: Mapping[str, Any], name: str) -> bool:
    """Tell whether an index lists a part."""
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def components_in(index: Mapping[str, Any], place: object, optional: Collection[str] = ()) -> list[str]:
    """The components that an index lists.

    Raises:
        UserError: it lists a network that is not here, or lacks one that is not `optional`.
    """
    row, name = class_of_index(index), index.get("_class_name")
    kind = row.kind
    folders = {part: folder_of(part, kind) for part in COMPONENTS[kind]}
    other = [part for part in OTHER_NETWORKS if present(index, part) and part not in folders.values()]
    if other:
        raise UserError(
            f"{place} lists {other[0]} ({name}); folders of Stable Diffusion 1, 2 and XL, which have none, are read"
        )
    required = [folders[part] for part in ("unet", "vae") if part in folders and part not in optional]
    missing = [part for part in (*required, "scheduler") if not present(index, part)]
    if row.keeps_index and not any(present(index, part) for part in TOKENIZERS):
        missing.append("text_encoder")
    if missing:
        raise UserError(f"{place} lists no {missing[0]} ({name})")
    return [part for part, folder in folders.items() if present(index, folder)]


def read_folder(
    path: str | Path,
    dtype: Dtypes = "float32",
    *,
    variant: str | None = None,
    place: Put | None = None,
    optional: Collection[str] = (),
) -> Checkpoint:
    """Reads a checkpoint that `write_checkpoint` or diffusers wrote.

    Args:
        dtype, place: as in `ReadOptions`.
        variant: e.g. "fp16": the weights of that name are taken where there are some, else the plain ones. Without it
            the half-precision ones are taken only where there are no others.
        optional: components that Stable Diffusion's folders may lack, e.g. ("vae",).

    Raises:
        UserError: the folder or a file of it is missing or corrupt, the networks are of a structure that is not here,
            the weights do not fit their configs, or `dtype` is unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    index = read_json(path / INDEX)
    row, settings = class_of_index(index), index.get(OWN, {})
    names = components_in(index, path / INDEX, optional if row.kind == STABLE_DIFFUSION else ())
    if not isinstance(settings, dict):
        raise UserError(f"{OWN} in {path / INDEX} is no JSON object")
    check_settings(settings, f"{OWN} of {path / INDEX}")
    tokenizers = {encoder: path / folder for encoder, folder in TOKENIZER_FOLDERS.items() if encoder in names}
    conditioning, said = "text", {}
    if row.kind == STABLE_DIFFUSION:
        tokenizers = {encoder: find_tokenizer(folder) for encoder, folder in tokenizers.items()}
    if row.keeps_index:
        ours = (WRITER, OWN, "_diffusers_version", "_name_or_path")
        said = {key: value for key, value in index.items() if not isinstance(value, list) and key not in ours}
        if CONTROLLED in str(said.get("_class_name")):
            del said["_class_name"]  # which follows from the networks: ControlNets are read apart from their model
    elif row.kind == LDM:
        settings = dict(settings)
        conditioning = settings.pop("task", row.conditioning)
        if not isinstance(conditioning, str) or not conditioning:
            known = [name for name, other in PIPELINES.items() if other.kind == LDM and other.conditioning]
            raise unknown("pipeline", index["_class_name"], known, str(path / INDEX))
    low = path / NOISING[row.kind]
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    low_res_scheduler = read_json(low / "scheduler_config.json") if present(index, low.name) else None
    components = {
        name: read_component(path / folder_of(name, row.kind), name, dtype, variant=variant, place=place)
        for name in names
    }
    if row.kind == PIXELS:
        conditioning = row.conditioning or pixel_conditioning(components["unet"].config, path / "unet")
    if conditioning == "super_resolution" and OWN not in index:
        components["vae"] = _unscaled(components["vae"])
    return Checkpoint(
        components=components,
        scheduler=scheduler,
        conditioning=conditioning,
        settings=settings,
        tokenizers={encoder: folder for encoder, folder in tokenizers.items() if folder.is_dir()},
        low_res_scheduler=low_res_scheduler,
        model_index=said,
    )


def read_component(
    path: str | Path,
    name: str,
    dtype: Dtypes = "float32",
    *,
    variant: str | None = None,
    place: Put | None = None,
) -> Component:
    """Reads one network of the kind `name`, a key of `ALL_FORMATS`, from its own folder, or from a file in one.

    Raises:
        UserError: as `read_folder`.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    extra, config = read_json(folder / "config.json"), read_config(folder, name)
    check_sample_size(extra, str(folder / "config.json"))
    tensors = read_file(path).tensors if path.is_file() else find_weights(path, ALL_FORMATS[name].weights, variant)
    return Component(config, read_params(name, config, tensors, path, ReadOptions(dtype, place)), extra)


def _unscaled(autoencoder: Component) -> Component:
    """The autoencoder as diffusers' LDMSuperResolutionPipeline uses it: without its scaling_factor."""
    return replace(autoencoder, config=replace(autoencoder.config, scaling_factor=1.0))


def read_config(path: str | Path, name: str) -> Any:
    """The sizes of a network in a folder of its own, e.g. an `AutoencoderConfig`; its weights are not read.

    Raises:
        UserError: as `read_folder`.
    """
    place = Path(path) / "config.json"
    return ALL_FORMATS[name].from_config(read_json(place), str(place))


def write_checkpoint(path: str | Path, checkpoint: Checkpoint, dtype: str | None = "float32") -> None:
    """Writes a folder that diffusers' pipeline of its kind loads, where it has one (see `pipeline_class`).

    All is written into a temporary sibling, which then takes the name; a killed run leaves the old folder. Where
    the folder is one that was written here before, its other contents (a model card, images) are kept. A `dtype` of
    None keeps the type of each array.

    Raises:
        UserError: as `check_target_folder`, the folder cannot be written, the parameters do not fit their config or are
            not finite in `dtype`, a text encoder or a tokenizer's files are missing.
    """
    path = Path(path).resolve()
    if checkpoint.kind == STABLE_DIFFUSION:
        check_text_encoders(checkpoint)
    added = added_tokens(checkpoint)
    check_target_folder(path)
    with atomic_write(path) as partial:
        partial.mkdir()
        for name, component in checkpoint.components.items():
            write_component(partial / folder_of(name, checkpoint.kind), name, component, dtype)
        for encoder, tokenizer in checkpoint.tokenizers.items():
            kind = tokenizer_class(encoder, checkpoint.components[encoder].config)
            write_tokenizer(kind, tokenizer, partial / TOKENIZER_FOLDERS[encoder], added.get(encoder, {}))
        for folder, config in _schedulers(checkpoint).items():
            write_json(partial / folder / "scheduler_config.json", config)
        write_json(partial / INDEX, _index(checkpoint))


def check_target_folder(path: Path) -> None:
    """Hold a folder's name to being free, or that of a checkpoint which was written here; a UserError otherwise."""
    recover(path.parent, {path.name})
    fresh = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not fresh and not ((path / INDEX).is_file() and read_json(path / INDEX).get(WRITER) == "sdjax"):
        raise UserError(f"{path} exists and was not written by sdjax; it is left as it is")


def write_component(path: str | Path, name: str, component: Component, dtype: str | None = "float32") -> None:
    """Writes one network of the kind `name` into a folder of its own, which `read_component` reads.

    Raises:
        UserError: the parameters do not fit their config or are not finite in `dtype`.
    """
    path, form, config = Path(path), ALL_FORMATS[name], component.config
    arrays = export(form.table(config), component.params, form.shapes(config), f"the {name} to be written")
    write_safetensors(path / f"{form.weights}.safetensors", arrays, None if dtype is None else dtype_named(dtype))
    # Of whatever type the file is, diffusers builds its networks in float32, and transformers as the config says.
    stored = {"dtype": "float32"} if name in (*TOKENIZERS, BERT) else {"_diffusers_version": DIFFUSERS_VERSION}
    kept = {key: value for key, value in component.extra.items() if key not in ("torch_dtype", "_name_or_path")}
    own = {key: kept[key] for key in (unet.SIZE_WIDTH,) if kept.get(key) is not None}
    write_json(path / "config.json", {**kept, **form.to_config(config), **own, **stored})


def _schedulers(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """The config of each scheduler, by its folder."""
    found = {"scheduler": checkpoint.scheduler}
    if checkpoint.low_res_scheduler is not None:
        found[NOISING[checkpoint.kind]] = checkpoint.low_res_scheduler
    for name, config in found.items():
        if not isinstance(config.get("_class_name"), str):
            raise UserError(f"the {name} config has no _class_name; it has {', '.join(config)}")
    return found


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model_index.json of a checkpoint."""
    name, kind = pipeline_class(checkpoint), checkpoint.kind
    row, index = class_of_index({"_class_name": name}), {}
    if row.keeps_index:
        index |= {part: [None, None] for part in (_XL_PARTS if row.absent == _XL else row.absent)}
        index |= {**(row.settings if name in PIPELINES else {}), **checkpoint.model_index}
    index |= {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, WRITER: "sdjax"}
    own = {"task": checkpoint.conditioning} if kind == LDM else {}
    if own := {**own, **checkpoint.settings}:
        index[OWN] = own
    for part, config in _schedulers(checkpoint).items():
        index[part] = ["diffusers", config["_class_name"]]
    for part, component in checkpoint.components.items():
        index[folder_of(part, kind)] = _class_of(part, component.config, name)
    for encoder in checkpoint.tokenizers:
        reader = tokenizer_class(encoder, checkpoint.components[encoder].config)
        index[TOKENIZER_FOLDERS[encoder]] = ["transformers", reader]
    return index


def _class_of(name: str, config: Any, pipeline: str) -> list[str]:
    """The library and the class of a network: those of diffusers, where it has them."""
    if name == "unet" and isinstance(config, UNet2DConfig):
        if unet2d.is_diffusers(config):
            return ["diffusers", unet2d.CLASS_NAME]
        return [OWN_PIXELS if pipeline == OWN_PIXELS else "diffusers", unet2d.OWN_CLASS_NAME]
    if isinstance(config, T5Config):
        return ["transformers", t5.CLASS_NAME]
    if name in TOKENIZERS:
        return ["transformers", clip.PLAIN if config.projection_dim is None else clip.PROJECTED]
    return {
        "unet": ["diffusers", unet.CLASS_NAME],
        "vae": ["diffusers", autoencoder.VQ_CLASS_NAME if isinstance(config, VQConfig) else autoencoder.CLASS_NAME],
        BERT: ["latent_diffusion", "LDMBertModel"],  # diffusers defines it beside the pipeline
        "class_embedder": [OWN_LDM, "ClassEmbedder"],
        "rescaler": [OWN_LDM, "SpatialRescaler"],
    }[name]
