"""Fields of requests and answers, named and defaulted as A1111's are (modules/api/models.py, modules/processing.py).

A field that is null or left out is the checkpoint's choice wherever it has one; unknown fields are passed over.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

LONGEST = 2**16


def _plain(value: Any) -> Any:
    """JSON that can be said again in an answer."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("it holds a number that is not finite, a broken character, or is nested too deeply") from error
    return value


Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=LONGEST)]
Named = Annotated[dict[str, Any], AfterValidator(_plain)]
Listed = Annotated[list[Any], AfterValidator(_plain)]
Blur = Annotated[float, Field(ge=0, le=64, allow_inf_nan=False)]  # as far as A1111's slider goes
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class GenerationFields(BaseModel):
    """Fields of both txt2img and img2img."""

    prompt: Text | None = ""
    negative_prompt: Text | None = ""
    styles: list[Text] | None = None
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: Finite | None = 0
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    sampler_name: Text | None = None
    sampler_index: Text | None = Field(None, description="older name of sampler_name")
    scheduler: Text | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = 1
    n_iter: Annotated[int, Field(ge=1)] | None = 1
    steps: int | None = None
    cfg_scale: Finite | None = None
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    eta: Finite | None = None
    s_churn: Finite | None = None
    s_noise: Finite | None = None
    denoising_strength: Finite | None = None
    refiner_checkpoint: Text | None = None
    refiner_switch_at: Finite | None = None
    override_settings: Named | None = None
    override_settings_restore_afterwards: bool | None = True
    script_name: Text | None = None
    script_args: Listed | None = None
    alwayson_scripts: Named | None = None
    send_images: bool | None = True
    save_images: bool | None = Field(False, description="images are kept where the server says, or nowhere")
    force_task_id: Annotated[str, Field(max_length=200)] | None = None


class TextToImage(GenerationFields):
    """A request of txt2img."""

    enable_hr: bool | None = False
    hr_scale: Finite | None = 2.0
    hr_upscaler: Text | None = None
    hr_second_pass_steps: int | None = 0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_checkpoint_name: Text | None = None
    hr_sampler_name: Text | None = None
    hr_scheduler: Text | None = None
    hr_prompt: Text | None = ""
    hr_negative_prompt: Text | None = ""


class ImageToImage(GenerationFields):
    """A request of img2img."""

    init_images: list[str] | None = None
    denoising_strength: Finite | None = 0.75
    resize_mode: Literal[0, 1, 2, 3] | None = 0
    mask: str | None = None
    mask_blur: Blur | None = None
    mask_blur_x: Blur | None = 4
    mask_blur_y: Blur | None = 4
    mask_round: bool | None = True
    inpainting_fill: Literal[0, 1, 2, 3] | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=2**14)] | None = 0
    inpainting_mask_invert: int | None = 0
    image_cfg_scale: Finite | None = None
    initial_noise_multiplier: Finite | None = None
    include_init_images: bool | None = False


class Generated(BaseModel):
    """An answer of txt2img and img2img."""

    images: list[str] | None = Field(description="PNG files in base64, their settings inside")
    parameters: dict[str, Any] = Field(description="the request")
    info: str = Field(description="JSON: prompts, seeds and settings of the images")


class ExtrasFields(BaseModel):
    """Fields of both kinds of enlargement."""

    resize_mode: Literal[0, 1] = Field(0, description="0 by a factor, 1 to a size")
    show_extras_results: bool | None = True
    gfpgan_visibility: Share = 0
    codeformer_visibility: Share = 0
    codeformer_weight: Share = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)] = 2
    upscaling_resize_w: Annotated[int, Field(ge=1)] = 512
    upscaling_resize_h: Annotated[int, Field(ge=1)] = 512
    upscaling_crop: bool = True
    upscaler_1: Text = "None"
    upscaler_2: Text = "None"
    extras_upscaler_2_visibility: Share = 0
    upscale_first: bool | None = False


class SingleImage(ExtrasFields):
    """A request of extra-single-image."""

    image: str = ""


class NamedImage(BaseModel):
    """An image of several."""

    data: str
    name: Text = ""


class BatchImages(ExtrasFields):
    """A request of extra-batch-images."""

    imageList: list[NamedImage] = Field(min_length=1)


class EnlargedImage(BaseModel):
    """An answer of extra-single-image."""

    image: str | None
    html_info: str


class EnlargedImages(BaseModel):
    """An answer of extra-batch-images."""

    images: list[str]
    html_info: str


class ImageWithSettings(BaseModel):
    """A request of png-info."""

    image: str


class ImageSettings(BaseModel):
    """An answer of png-info."""

    info: str
    items: dict[str, str]
    parameters: dict[str, str]


class ProgressAnswer(BaseModel):
    """An answer of progress."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


class TaskQuery(BaseModel):
    """A request of /internal/progress."""

    id_task: Annotated[str, Field(max_length=200)] | None = None
    id_live_preview: int | None = -1
    live_preview: bool | None = True


class TaskProgress(BaseModel):
    """An answer of /internal/progress."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None
    textinfo: str | None = None


class SamplerItem(BaseModel):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SchedulerItem(BaseModel):
    """A spacing of noise levels."""

    name: str
    label: str
    aliases: list[str] | None
    default_rho: float | None
    need_inner_model: bool | None


class UpscalerItem(BaseModel, protected_namespaces=()):
    """A way to enlarge an image."""

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float | None = None


class CheckpointItem(BaseModel, protected_namespaces=()):
    """A checkpoint."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class LoraItem(BaseModel):
    """A LoRA that prompts may name."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class EmbeddingItem(BaseModel):
    """A word of textual inversion."""

    step: int | None
    sd_checkpoint: str | None
    sd_checkpoint_name: str | None
    shape: int
    vectors: int


class Embeddings(BaseModel):
    """Words of the current model, and those that fit only others."""

    loaded: dict[str, EmbeddingItem]
    skipped: dict[str, EmbeddingItem]
