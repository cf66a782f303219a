"""The one table of options: what a call, a flag, a line of a prompt file, a grid and a PNG's text may set.

A new option is one row here and its use. From the row come its type for editors and type checkers, its check, its flag
and help, its place in prompt files and grids, and its name in A1111's text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

import numpy as np

from sdjax.core.errors import UserError, unknown
from sdjax.core.torch_rng import MAX_SEED
from sdjax.data.hints.makers import HINTS
from sdjax.data.hints.resize import RESIZES
from sdjax.data.image_inputs import ImageInput
from sdjax.diffusion.samplers import SAMPLERS, SPACINGS
from sdjax.pipeline.seeds import RANDOM

Number = int | float
Pair = Sequence[int]
Scales = Sequence[Number | Sequence[Number]]
Images = ImageInput | Sequence[ImageInput]
Stages = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
Sources = str | Path | Sequence[str | Path]
Progress = Callable[[int, int], None]
"""progress(done, total) network calls."""
MAX_SIDE, MAX_BITS = 2**14, 1023
Scope = Literal["image", "call", "load"]


@dataclasses.dataclass(frozen=True)
class Option:
    """One row of the table.

    Attributes:
        help: a phrase.
        least, most: of numbers, inclusive; a checkpoint's own narrower range is checked where it is used.
        choices: of texts; () for any.
        label: A1111's name in the text of a PNG; "" where it has none.
        scope: "image" for what may differ from image to image, and so stands in prompt files and records; "call" for
            arguments of a call in Python; "load" for what is loaded.
        grid: whether it may be an axis of a grid.
        kind: int, float, str, bool, Pair, Scales or Images; taken from the annotation.
        condition: whether only models that are conditioned on it read it.
        table: whether it goes to the sampler's table under its own name.
        file: whether it names a file.
        many: whether a flag may be repeated.
        none: what None means in a call; None for the checkpoint's choice.
    """

    help: str
    least: Number = -math.inf
    most: Number = math.inf
    choices: tuple[str, ...] = ()
    label: str = ""
    scope: Scope = "image"
    grid: bool = True
    kind: Any = str
    condition: bool = False
    table: bool = False
    file: bool = False
    many: bool = False
    none: Any = None

    @property
    def is_number(self) -> bool:
        """True if its values are numbers."""
        return self.kind in (int, float)

    @property
    def is_axis(self) -> bool:
        """True if a grid may have it as an axis."""
        return self.scope == "image" and self.grid and (self.is_number or self.kind is Scales or bool(self.choices))


def _image(text: str, *, many: bool = False) -> Option:
    return Option(text, grid=False, file=True, many=many)


def _condition(
    text: str, least: Number = -math.inf, most: Number = math.inf, *, grid: bool = False, file: bool = False
) -> Option:
    return Option(text, least, most, grid=grid, condition=True, file=file)


class Options(TypedDict, total=False):
    """Keyword arguments of a call; None or nothing leaves the choice to the checkpoint, but a seed of None is drawn."""

    steps: Annotated[
        int | None, Option("of the sampler; some call the network more than once a step", 1, label="Steps")
    ]
    sampler: Annotated[str | None, Option("as A1111 and k-diffusion know it", choices=tuple(SAMPLERS), label="Sampler")]
    schedule: Annotated[str | None, Option("spacing of the noise levels", choices=SPACINGS, label="Schedule type")]
    guidance_scale: Annotated[
        Number | None, Option("of classifier-free guidance; 1 or less is none", 0, label="CFG scale")
    ]
    guidance_rescale: Annotated[Number | None, Option("phi of Lin et al. 2024", 0, 1, label="CFG Rescale")]
    eta: Annotated[
        Number | None,
        Option("of DDIM (0 deterministic) or of the ancestral samplers (1 as known)", 0, 1, label="Eta", table=True),
    ]
    s_noise: Annotated[
        Number | None,
        Option("factor on the noise of the ancestral and SDE samplers", 0, label="Sigma noise", table=True),
    ]
    seed: Annotated[
        int | None,
        Option(
            "with an image's index it decides all its noise; -1 draws one", RANDOM, MAX_SEED, label="Seed", none=RANDOM
        ),
    ]
    width: Annotated[int | None, Option("in pixels", 1, MAX_SIDE)]
    height: Annotated[int | None, Option("in pixels", 1, MAX_SIDE)]
    num_images: Annotated[int | None, Option("of each prompt", 1, 2**20, grid=False)]
    first_index: Annotated[int | None, Option("of the first image", 0, 2**31 - 1, label="Image index", grid=False)]
    clip_skip: Annotated[
        int | None, _condition("layers of the text encoders to skip, as diffusers counts", 0, grid=True)
    ]
    syntax: Annotated[str | None, Option("of prompts", choices=("a1111", "plain"), condition=True)]
    wildcard_dir: Annotated[
        str | Path | None,
        _condition("folder of text files; __name__ in a prompt is one of name.txt's lines", file=True),
    ]
    rng: Annotated[str | None, Option("jax, or torch for the noise of PyTorch on a CPU", choices=("jax", "torch"))]
    torch_batch: Annotated[int | None, Option("images that PyTorch draws for together", 1, grid=False)]
    init_image: Annotated[Images | None, _image("image to begin from, to keep part of, or to enlarge")]
    strength: Annotated[
        Number | None, Option("share of the steps that init_image goes through", 0, 1, label="Denoising strength")
    ]
    mask: Annotated[Images | None, _image("white where init_image is made anew")]
    masked_content: Annotated[
        str | None,
        Option("latents under the mask to begin from, as A1111 has them", choices=("image", "noise", "nothing")),
    ]
    feather: Annotated[Number | None, Option("pixels within the mask over which init_image fades out", 0)]
    depth: Annotated[Images | None, _condition("depth map, near as bright", file=True)]
    noise_level: Annotated[
        int | None, _condition("of an upscaler's small image; more lets it invent more", 0, 999, grid=True)
    ]
    class_label: Annotated[str | int | Sequence[str | int] | None, _condition("number or name of a class")]
    layout: Annotated[Any, _condition('JSON file of {"class": ..., "box": [x, y, width, height]}', file=True)]
    label_map: Annotated[Images | None, _condition("image of one channel, whose values are classes", file=True)]
    neighbours: Annotated[Any, _condition("NumPy file of CLIP embeddings [k, d]", file=True)]
    control_image: Annotated[
        Images | Sequence[Images] | None,
        _image("hint of a ControlNet; of several one each, in their order", many=True),
    ]
    control_scale: Annotated[Number | Scales | None, Option("strength of each ControlNet; 1 where none is named")]
    control_start: Annotated[Number | Scales | None, Option("share of the steps before a ControlNet acts", 0, 1)]
    control_end: Annotated[Number | Scales | None, Option("share of the steps until which it acts", 0, 1)]
    control_mode: Annotated[
        str | None,
        Option(
            "A1111's balanced, prompt or control (the original guess mode), diffusers' guess, the paper's resolution",
            choices=("balanced", "prompt", "control", "guess", "resolution"),
        ),
    ]
    control_from: Annotated[
        str | Sequence[str] | None,
        Option(
            f"maker of the hint from control_image, where that is none yet: {', '.join(HINTS)}; canny:50:150",
            grid=False,
        ),
    ]
    control_resize: Annotated[
        str | None,
        Option("of a hint that has not the proportions of the image, as A1111 does it", choices=RESIZES, grid=False),
    ]
    resemble: Annotated[Images | None, _image("image that the result shall be like")]
    resemble_scale: Annotated[Number | None, Option("how strongly", 0)]
    ip_image: Annotated[
        Images | Sequence[Images] | None,
        _image("image that is a prompt, too; repeated for several of one prompt", many=True),
    ]
    ip_scale: Annotated[Number | None, Option("how strongly, 1 as trained; 0.5 leaves room for the text")]
    ip_blocks: Annotated[
        str | Mapping[str, Any] | None,
        Option('of SDXL: style, layout or both; or JSON of scales as {"up": {"block_0": [0, 1, 0]}}', grid=False),
    ]
    t2i_image: Annotated[
        Images | Sequence[Images] | None,
        _image("hint of a T2I-Adapter; of several one each, in their order", many=True),
    ]
    t2i_scale: Annotated[Number | Scales | None, Option("how strongly it acts, 1 as trained; of each where several")]
    t2i_factor: Annotated[Number | None, Option("share of the steps, from the first, at which it acts", 0, 1)]
    classifier_scale: Annotated[Number | None, _condition("of a classifier's guidance", 0, grid=True)]
    lora_scale: Annotated[
        Number | Scales | None,
        _condition("strength of each LoRA, e.g. 0.8,0.5:0.3 for UNet:text encoders", grid=True),
    ]
    original_size: Annotated[Pair | None, _condition("SDXL's size condition: height,width before cropping", 1)]
    crop: Annotated[Pair | None, _condition("SDXL's crop condition: top,left", 0)]
    target_size: Annotated[Pair | None, _condition("SDXL's target size condition: height,width", 1)]
    aesthetic_score: Annotated[Number | None, _condition("condition of SDXL's refiner", 0, grid=True)]
    negative_aesthetic_score: Annotated[Number | None, _condition("the same of the negative prompt", 0, grid=True)]
    refiner_start: Annotated[Number | None, Option("share of the noise levels from which a refiner takes over", 0, 1)]
    hires: Annotated[Number | None, Option("factor of a second pass over the enlarged image", 1, label="Hires upscale")]
    hires_strength: Annotated[Number | None, Option("strength of the second pass", 0, 1)]
    hires_steps: Annotated[
        int | None,
        Option(
            "that the second pass runs, as A1111 counts; else its strength's share of steps", 1, label="Hires steps"
        ),
    ]
    stages: Annotated[
        Stages | None,
        Option(
            "settings of a later stage of a cascade: steps=30,guidance_scale=4; repeated for each, in their order",
            grid=False,
            many=True,
        ),
    ]
    tile: Annotated[int | None, Option("pixels of the autoencoder's tiles; 0 for none", 0)]
    guess_mode: Annotated[bool | None, Option("diffusers' name of control_mode guess", scope="call")]
    paste: Annotated[bool | None, Option("put init_image's own pixels back outside of the mask", scope="call")]
    latents: Annotated[Any, Option("standard normal first noise [n, h, w, z]; it decides the size", scope="call")]
    output: Annotated[
        str | None,
        Option(
            "image, unscaled latents, or the images of every stage", choices=("image", "latent", "stages"), scope="call"
        ),
    ]
    batch_size: Annotated[int | None, Option("images of one pass", 1, scope="call")]
    progress: Annotated[Progress | None, Option("called after every network call", scope="call")]


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `sdjax.load` beside the source, the arithmetic's type and the device mesh."""

    family: Annotated[str | None, Option("what a single file is, where its keys and shapes mislead", scope="load")]
    prediction: Annotated[str | None, Option("prediction type in place of the checkpoint's", scope="load")]
    variant: Annotated[str | None, Option("of a folder's weights, e.g. fp16", scope="load")]
    vae: Annotated[str | Path | None, Option("another autoencoder: a Hub id, folder or file", scope="load")]
    controlnet: Annotated[
        Sources,
        Option("ControlNet: a Hub id, folder or file; repeated for several", scope="load", many=True),
    ]
    custom_diffusion: Annotated[
        str | Path | None,
        Option("weights of Custom Diffusion: a file of diffusers, or a workdir of their training", scope="load"),
    ]
    embeddings: Annotated[
        Sources,
        Option(
            "textual inversions: files, A1111's images among them, or workdirs of training", scope="load", many=True
        ),
    ]
    lora: Annotated[Sources, Option("LoRA, of any kind and naming: FILE or FILE:0.8", scope="load", many=True)]
    merge_lora: Annotated[Sources, Option("LoRA at a fixed strength, merged into the weights", scope="load", many=True)]
    lora_dir: Annotated[str | Path | None, Option("folder of LoRAs, which prompts name: <lora:name:0.8>", scope="load")]
    refiner: Annotated[str | Path | None, Option("checkpoint that takes over the last steps", scope="load")]
    then: Annotated[
        Sources,
        Option("next stage of a cascade, e.g. an upscaler; repeated for several, in order", scope="load", many=True),
    ]
    ip_adapter: Annotated[
        str | Path | None, Option("IP-Adapter, by which images are prompts: a file, local or of the Hub", scope="load")
    ]
    image_encoder: Annotated[
        str | Path | None, Option("folder of its CLIP, where that is not beside it; or of the Hub", scope="load")
    ]
    t2i_adapter: Annotated[
        Sources,
        Option("T2I-Adapter: a folder or file, local or of the Hub; repeated for several", scope="load", many=True),
    ]
    classifier: Annotated[str | Path | None, Option("classifier of noisy images, for guidance", scope="load")]
    tokenizer: Annotated[str | Path | None, Option("folder with BERT's vocab.txt, for LDM's text models", scope="load")]


@functools.cache
def table_of(options: type) -> dict[str, Option]:
    """The rows of `Options` or `LoadOptions` by name, each with the kind that its annotation says."""
    rows = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        kind, option = get_args(hint)[:2]
        rows[name] = dataclasses.replace(option, kind=_kind(kind))
    return rows


def _kind(hint: Any) -> Any:
    kinds = set(get_args(hint) or (hint,)) - {type(None)}
    if Pair in kinds or Scales in kinds:
        return Pair if Pair in kinds else Scales
    if float in kinds:
        return float
    if kinds == {int}:
        return int
    return bool if kinds == {bool} else str


# A call takes negative prompts beside its prompts.
OPTIONS = table_of(Options) | {"negative_prompt": _condition("condition that guidance departs from")}
LOAD_OPTIONS = {
    "dtype": Option("of the arithmetic", choices=("float32", "bfloat16"), scope="load"),
    **table_of(LoadOptions),
}


def help_of(table: Mapping[str, Option]) -> str:
    """Lines of --help, one an option."""
    lines = []
    for name, option in table.items():
        limits = f" ({', '.join(option.choices)})" if option.choices else ""
        if option.is_number and not (math.isinf(option.least) and math.isinf(option.most)):
            limits = f" ({_range(option.least, option.most)})"
        value = {int: "N", float: "X", Pair: "N,N", Scales: "X,X"}.get(option.kind, "FILE" if option.file else "NAME")
        flag = f"    --{name} {value}"
        text = textwrap.fill(option.help + limits, 120, initial_indent=" " * 29, subsequent_indent=" " * 29)
        lines.append(f"{flag:<28} {text.lstrip()}")
    return "\n".join(lines) + "\n"


def check_options(given: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Options of a call for which None has a meaning, or that are not; a UserError: unknown, or as in `check_value`."""
    for name in given:
        if name not in OPTIONS:
            raise unknown("option", name, OPTIONS, place)
    given = {name: OPTIONS[name].none if value is None else value for name, value in given.items()}
    return {name: check_value(name, value, place) for name, value in given.items() if value is not None}


def check_value(name: str, value: Any, place: str = "") -> Any:
    """A value of an option as Python has it; a UserError: of another type, out of range, or none of the choices."""
    option = OPTIONS[name]
    if option.kind is int:
        return check_int(name, value, option.least, option.most, place)
    if option.kind is float:
        return check_float(name, value, option.least, option.most, place)
    if option.kind is Pair:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            limits = _range(option.least, math.inf)
            raise UserError(f"{name} {value!r}{_in(place)}: choose two integers of {limits}, vertical first")
        return tuple(check_int(name, part, option.least, place=place) for part in value)
    if option.kind is Scales:
        return _check_scales(name, value, place)
    if option.choices and value not in option.choices:
        raise unknown(name, value, option.choices, place)
    return value


def _check_scales(name: str, value: Any, place: str) -> Any:
    """One number, or for each of several things one, or a pair of two."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return check_float(name, value, OPTIONS[name].least, OPTIONS[name].most, place)
    pairs = [part if isinstance(part, Sequence) and not isinstance(part, str) else [part] for part in value]
    if any(len(pair) not in (1, 2) for pair in pairs):
        raise UserError(f"{name} {value!r}{_in(place)}: choose a number for each, or a pair")
    numbers = [[check_float(name, number, place=place) for number in pair] for pair in pairs]
    return [pair[0] if len(pair) == 1 else pair for pair in numbers]


def parse_value(name: str, text: str | Sequence[str], place: str) -> Any:
    """A value of an option that is written as text at a place, e.g. a flag; errors as of `check_value`.

    Several texts, of a flag that is repeated, are a list; one alone is none.
    """
    option = OPTIONS[name]
    if not isinstance(text, str):
        values = [parse_value(name, one, place) for one in text]
        return values if len(values) > 1 else values[0]
    if option.kind is Scales:
        parts = [[parse_number(name, number, float, place) for number in part.split(":")] for part in text.split(",")]
        return check_value(name, parts if len(parts) > 1 or len(parts[0]) > 1 else parts[0][0], place)
    if option.kind is Pair:
        return check_value(name, [parse_number(name, part, int, place) for part in text.split(",")], place)
    return check_value(name, parse_number(name, text, option.kind, place) if option.is_number else text, place)


def parse_number(name: str, text: str, kind: Any, place: str = "") -> Number:
    """A number that is written as text; a UserError where it is none."""
    try:
        return int(text) if kind is int else float(text)
    except ValueError as error:
        option = OPTIONS.get(name, Option(""))
        noun = "an integer" if kind is int else "a number"
        raise UserError(f"{name} {text!r}{_in(place)}: choose {noun} of {_range(option.least, option.most)}") from error


def check_int(name: str, value: Any, least: Number = -math.inf, most: Number = math.inf, place: str = "") -> int:
    """An integer in a range; a UserError where it is not."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise UserError(f"{name} {value!r}{_in(place)}: choose an integer of {_range(least, most)}")
    return int(value)


def check_float(name: str, value: Any, least: Number = -math.inf, most: Number = math.inf, place: str = "") -> float:
    """A finite number in a range; a UserError where it is not."""
    number = isinstance(value, Number | np.floating | np.integer) and not isinstance(value, bool)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:  # beyond what a float holds
        number = False
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise UserError(f"{name} {value!r}{_in(place)}: choose a number of {_range(least, most)}")
    return float(value)


def _in(place: str) -> str:
    return f" in {place}" if place else ""


def _range(least: Number, most: Number) -> str:
    if math.isinf(least):
        return "any size"
    return f"at least {_exact(least)}" if math.isinf(most) else f"{_exact(least)} to {_exact(most)}"


def _exact(bound: Number) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
