"""Makes pictures with a trained model.

    python sample.py --config configs/NAME.py --prompt TEXT [--prompt TEXT ...] | --from_file FILE | --from_image PNG

What to paint
    --prompt TEXT            in A1111's syntax: (word:1.2), [word], BREAK; --syntax=plain reads it as it stands
    --negative_prompt TEXT
    --from_file FILE         one prompt a line, with its own settings after it: a red heart --steps 20 --seed 3
    --from_image PNG         paints a picture again from the settings inside it; further flags change them
    --num_images N           of each prompt
    --first_index N          the number of the first picture, which with the seed decides its noise
    --grid "steps=10,20;sampler=euler,dpmpp_2m"      every combination, and a labelled sheet of them

With which model
    --checkpoint SOURCE      a Hub id, a diffusers folder, a .safetensors or .ckpt file, or the workdir of a finished
                             train.py run; --family, --prediction say what a file is where it misleads,
                             --variant fp16 which weights of a folder
                             --dtype bfloat16 the arithmetic
    --vae SOURCE             another autoencoder     --embedding FILE (repeated)    textual inversions
    --refiner SOURCE         takes over from --refiner_start 0.8 of the noise levels

How
    --seed 0 --steps N --sampler NAME --schedule NAME --guidance_scale S --guidance_rescale PHI --eta ETA
    --width W --height H --clip_skip N --rng jax|torch --tile PIXELS
    --original_size H,W --crop TOP,LEFT --target_size H,W --aesthetic_score S --negative_aesthetic_score S
    --hires 2 --hires_strength 0.5                   a second pass over the enlarged picture

Models of the LDM paper and of ADM
    --checkpoint SOURCE      also a file of theirs (model.ckpt, 256x256_diffusion.pt); --tokenizer FOLDER, that of BERT
    --class_label N|NAME     --layout FILE.json     --label_map FILE     --init_image FILE [--mask FILE]
    --neighbours FILE.npy
                             what a model of classes, boxes, label maps, small pictures or holes is told instead of
                             a prompt; FILE.json is a list of {"class": N or NAME, "box": [x, y, width, height]}
    --resemble FILE --resemble_scale S               any model of LDM's is drawn to a picture, e.g. a small one
    --classifier SOURCE --classifier_scale S         guides a model of pixels to the class

From pictures
    --init_image FILE --strength S    --mask FILE --feather PIXELS    --depth FILE    --noise_level N

Where to
    --outdir DIR             without it, a new folder of outputs/

On several hosts
    as train.py: SLURM, Open MPI and TPU pods are recognised, elsewhere --coordinator HOST:PORT --processes N
    --process_id I. All devices make every batch together, and each process writes its share of the files into the one
    folder.

Files are 00000.png, 00001.png, ... in the order of the prompts, each with its settings inside and in a JSON beside it,
and grid.png when there are several. The same seed, prompt and place in that order give the same picture. Any value of
the config can be set: --config.sample.dtype=bfloat16.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image
from tqdm import tqdm

import sdjax
from sdjax.convert.model_index import STABLE_DIFFUSION
from sdjax.convert.opening import kind_of
from sdjax.core.compile_cache import keep_compiled
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.flags import PROCESSES, TIMEOUTS, define_processes, parse_flags
from sdjax.parallel.distributed import agreed, end_by_signals, initialise, is_first, is_mine, run_together, sync
from sdjax.parallel.mesh import make_mesh
from sdjax.pipeline.grids import Axis, cells, contact_sheet, parse_grid
from sdjax.pipeline.loading import find
from sdjax.pipeline.orders import Order, groups, list_orders
from sdjax.pipeline.prompt_files import PromptLine, read_prompt_file
from sdjax.pipeline.records import check_free, fresh_folder, read_parameters, write_grid, write_picture
from sdjax.pipeline.run import Progress
from sdjax.pipeline.second_pass import STRENGTH, check_second_pass, repaint
from sdjax.tasks.base import tile, to_uint8

# The keyword arguments of a call that flags and config.sample may set, by type.
TEXTS = ("negative_prompt", "sampler", "schedule", "syntax", "rng", "init_image", "mask", "depth")
INTEGERS = ("seed", "steps", "width", "height", "clip_skip", "noise_level", "tile", "num_images", "torch_batch")
REALS = ("guidance_scale", "guidance_rescale", "eta", "strength", "feather", "aesthetic_score")
REALS += ("negative_aesthetic_score", "refiner_start", "hires", "hires_strength")
PAIRS = ("original_size", "crop", "target_size")
CALL = (*TEXTS, *INTEGERS, *REALS, *PAIRS)
# What is loaded.
SOURCES = ("checkpoint", "refiner", "vae", "family", "prediction", "variant", "dtype")
LISTS = ("prompt", "embedding")
# What models of the LDM paper are told instead of a prompt, and what else their calls understand.
CONDITIONS = ("class_label", "layout", "label_map", "neighbours")
CONDITIONAL = (*CONDITIONS, "init_image", "mask", "steps", "sampler", "schedule", "eta", "guidance_scale", "seed")
CONDITIONAL += ("width", "height", "num_images", "first_index", "classifier_scale", "resemble", "resemble_scale")
# What else such a model is loaded with.
BESIDE = ("classifier", "tokenizer")
SCALES = ("classifier_scale", "resemble_scale")
OTHER = ("from_file", "from_image", "grid", "outdir")
GRID_PIXELS = 2**25


class Work(NamedTuple):
    """What a command line asks for.

    Attributes:
        orders: every picture.
        axes: of a grid; () without one.
        sources: what to load: `SOURCES` and embedding.
        outdir: None for a new folder.
    """

    orders: list[Order]
    axes: tuple[Axis, ...]
    sources: dict[str, Any]
    outdir: Path | None


def main() -> None:
    """Reads the command line, samples, and says where the pictures are."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sdjax").setLevel(logging.INFO)
    config, flag = read_command_line(sys.argv)
    if is_conditional(source := flag["checkpoint"] or config.sample.get("checkpoint", ""), flag["variant"]):
        keep_compiled()
        print(make_conditional(source, config, flag))
        return
    work = read_work(config, flag)
    keep_compiled()
    end_by_signals()
    initialise(**{name: flag[name] for name in PROCESSES})
    folder = make(work, *load(work.sources, config))
    if is_first():
        print(folder)


def read_command_line(argv: list[str]) -> tuple[Config, dict[str, Any]]:
    """The config, and the flags by name; None where one was not given.

    Raises:
        UserError: a flag is missing, unknown or does not go with another.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    for name in (*TEXTS, *SOURCES, *OTHER, *CONDITIONS, *BESIDE, "resemble"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in (*INTEGERS, "first_index"):
        flags.DEFINE_integer(name, None, "", flag_values=values)
    for name in (*REALS, *SCALES):
        flags.DEFINE_float(name, None, "", flag_values=values)
    for name in PAIRS:
        flags.DEFINE_list(name, None, "", flag_values=values)
    for name in LISTS:
        flags.DEFINE_multi_string(name, None, "", flag_values=values)
    define_processes(values)
    parse_flags(values, argv, __doc__)
    flag: dict[str, Any] = {name: values[name].value for name in values}
    config = flag.pop("config")
    if config is None:
        raise UserError("--config is required")
    if flag["num_images"] is not None and flag["num_images"] < 1:
        raise UserError(f"--num_images {flag['num_images']}: choose at least 1")
    for name in PAIRS:
        flag[name] = None if flag[name] is None else whole_numbers(name, flag[name])
    return config, flag


def is_conditional(source: str, variant: str | None) -> bool:
    """Whether a checkpoint is one of the LDM paper's or of ADM's, not told Stable Diffusion's prompts."""
    return bool(source) and kind_of(find(beside(source), variant)) != STABLE_DIFFUSION


def make_conditional(source: str, config: Config, flag: Mapping[str, Any]) -> Path:
    """Makes and writes pictures of one condition; returns their folder.

    Raises:
        UserError: a flag is not for this model, or its value is not what it should be; nothing has been overwritten.
    """
    known = {*CONDITIONAL, *BESIDE, *TIMEOUTS, "prompt", "outdir", "checkpoint", "dtype", "family"}
    for name, value in flag.items():
        if value is not None and name not in known:
            raise UserError(f"--{name} is not for a model that is told classes, layouts, label maps or pictures")
    if flag["prompt"] is not None and len(flag["prompt"]) > 1:
        raise UserError("give one --prompt; --num_images makes more pictures of it")
    others = {name: flag[name] for name in ("family", *BESIDE)}
    mesh = make_mesh(cast(Any, config.mesh)) if jax.device_count() > 1 else None
    pipe = sdjax.load_conditional(beside(source), flag["dtype"] or "float32", mesh, **others)
    options = {name: flag[name] for name in CONDITIONAL if flag[name] is not None}
    for name in set(options) - set(inspect.signature(pipe).parameters):
        raise UserError(f"--{name} is not for {pipe.name}, a model of {pipe.task}")
    prompt, outdir, first = (flag["prompt"] or [None])[0], flag["outdir"], flag["first_index"] or 0
    count = flag["num_images"] or 1
    if outdir is not None:
        files = [f"{first + i:05d}.{end}" for i in range(count) for end in ("png", "json")]
        check_free(Path(outdir), files + ["grid.png"] * (count > 1), "choose another --outdir")
    images = to_uint8(pipe(prompt, **options))
    folder = fresh_folder(Path("outputs") / pipe.name) if outdir is None else Path(outdir)
    record = {**pipe.settings, "seed": 0, **options, "checkpoint": source, "prompt": prompt or "", "model": pipe.name}
    for i, image in enumerate(images):
        write_picture(folder / f"{first + i:05d}.png", image, {**record, "index": first + i})
    if count > 1:
        write_grid(folder / "grid.png", grid(list(images)))
    return folder


def whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
    """The integers of a flag.

    Raises:
        UserError: there are not two.
    """
    try:
        values = [int(text) for text in texts]
    except ValueError:
        values = []
    if len(values) != 2:
        raise UserError(f"--{name} {','.join(texts)!r}: give two integers, vertical first, e.g. 1024,1024")
    return values


def read_work(config: Config, flag: Mapping[str, Any]) -> Work:
    """What to paint and how: the flags, then a given picture's own record, then the config.

    Raises:
        UserError: a file or the grid cannot be read.
    """
    texts = sum(flag[name] is not None for name in ("prompt", "from_file"))
    if texts > 1 or (not texts and flag["from_image"] is None):
        raise UserError("give one of --prompt, --from_file and --from_image")
    others = (*CONDITIONS, *BESIDE, *SCALES, "resemble")
    for name in others:
        if flag[name] is not None:
            raise UserError(f"--{name} is for models that are told it; this one paints prompts")
    told = {name: value for name, value in flag.items() if value is not None and name not in others}
    record, settings = {}, dict(cast(Any, config.sample))
    if flag["from_image"] is not None:
        record = read_parameters(flag["from_image"])
        # Of the config only the model counts, for pictures that do not name theirs.
        settings = {name: settings[name] for name in ("checkpoint", "dtype") if name in settings} | record
        tell_sources(flag["from_image"], record)
    settings |= told
    if flag["from_file"] is not None:
        lines = read_prompt_file(Path(flag["from_file"]))
    else:
        lines = [PromptLine(prompt, {}) for prompt in flag["prompt"] or [record["prompt"]]]
    axes = parse_grid(flag["grid"]) if flag["grid"] is not None else ()
    common = {name: settings[name] for name in CALL if settings.get(name) is not None}
    first = flag["first_index"] if flag["first_index"] is not None else record.get("index", 0)
    return Work(
        orders=list_orders(lines, common, cells(axes) if axes else [{}], first),
        axes=axes,
        sources={name: settings.get(name) for name in (*SOURCES, "embedding")},
        outdir=None if flag["outdir"] is None else Path(flag["outdir"]),
    )


def tell_sources(picture: str, record: Mapping[str, Any]) -> None:
    """Says which files a picture names, which are read on its word."""
    for name in (*SOURCES, "embedding", "init_image", "mask", "depth"):
        if record.get(name):
            logging.getLogger("sdjax").info("%s: %s %s", picture, name, record[name])


def load(sources: Mapping[str, Any], config: Config) -> tuple[sdjax.Pipeline, dict[str, Any], dict[str, Any]]:
    """The pipeline, what is added to every call, and what every record says of them.

    Raises:
        UserError: a checkpoint cannot be read.
    """
    axes = cast(Any, config.mesh)
    mesh = make_mesh(axes) if jax.device_count() > 1 else None
    dtype = sources["dtype"] or "float32"
    if not sources["checkpoint"]:
        raise UserError("this config has no sample.checkpoint; give --checkpoint")
    named = {name: sources[name] for name in ("family", "prediction", "variant", "vae")}
    pipe = sdjax.load(beside(sources["checkpoint"]), dtype, mesh, embeddings=sources["embedding"] or (), **named)
    refiner = sdjax.load(sources["refiner"], dtype, mesh) if sources["refiner"] else None
    record = {name: value for name, value in sources.items() if value} | {"dtype": dtype, "model": pipe.name}
    return pipe, {} if refiner is None else {"refiner": refiner}, record


def beside(source: str) -> str:
    """A config's checkpoint may be given relative to this script."""
    path = Path(__file__).parent / source
    return str(path) if path.exists() and not Path(source).exists() else source


def make(work: Work, pipe: sdjax.Pipeline, loaded: Mapping[str, Any], record: Mapping[str, Any]) -> Path:
    """Makes and writes all pictures; returns their folder.

    Raises:
        UserError: a setting or a file is not what it should be; nothing has been overwritten.
    """
    orders, outdir = sorted(work.orders), work.outdir
    for group in groups(work.orders):  # what is wrong is said before the first picture
        paint(pipe, group, {**loaded, "dry_run": True}, [])
    if outdir is not None:
        files = [f"{order.number:05d}.{end}" for order in orders for end in ("png", "json")]
        check_free(outdir, files + ["grid.png"] * (len(orders) > 1), "choose another --outdir")
    sync("nobody writes before all have looked")

    made: dict[int, np.ndarray] = {}
    passes = list(split(pipe, work.orders))
    with tqdm(desc="compiling", unit="call", dynamic_ncols=True, disable=not is_first()) as bar:
        for done, (batch, chosen) in enumerate(passes):
            paints = 2 if "hires" in chosen[0].options else 1
            bars = [advance(bar, paints * (len(passes) - done) - i) for i in range(paints)]
            images = paint(pipe, chosen, {**loaded, "batch_size": batch}, bars)
            outdir = outdir or shared_folder(Path("outputs") / pipe.name)
            for order, image in zip(chosen, to_uint8(images), strict=True):
                settings = {**resolved(pipe, order.options), **record, "prompt": order.prompt, "index": order.index}
                if is_mine(order.number):
                    write_picture(outdir / f"{order.number:05d}.png", image, settings)
                made[order.number] = image
    assert outdir is not None, "there is at least one prompt"
    if len(made) > 1 and is_first():
        images = [made[number] for number in sorted(made)]
        write_grid(outdir / "grid.png", contact_sheet(images, work.axes) if work.axes else grid(images))
    return outdir


def shared_folder(parent: Path) -> Path:
    """A new folder that the first process makes for all."""
    return Path(agreed(str(fresh_folder(parent)) if is_first() else ""))


def resolved(pipe: sdjax.Pipeline, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a picture, those that the checkpoint decided included."""
    names = {field.name for field in dataclasses.fields(pipe.settings())}
    chosen = {name: value for name, value in options.items() if name in names}
    settings = dataclasses.asdict(pipe.settings(init_image=options.get("init_image"), **chosen))
    # What SDXL is told of sizes follows the picture's own unless it was chosen, and only upscalers have a noise level.
    left_out = {name for name in (*PAIRS, *(["noise_level"] * (pipe.system.extra != "picture"))) if name not in options}
    record = {**options, **{name: value for name, value in settings.items() if name not in left_out}}
    return record | ({"hires_strength": options.get("hires_strength", STRENGTH)} if "hires" in options else {})


def split(pipe: sdjax.Pipeline, orders: Sequence[Order]) -> Iterator[tuple[int, list[Order]]]:
    """Passes, as (batch size, orders); what is made is on disk before the next begins."""
    for group in groups(orders):
        settings = resolved(pipe, group[0].options)
        batch = pipe.batch_size(len(group), settings["height"], settings["width"])
        if settings["rng"] == "torch":  # which draws for a whole group at once
            total = group[0].options.get("torch_batch", group[-1].index + 1)
            group = [order._replace(options={**order.options, "torch_batch": total}) for order in group]
        rest = iter(group)
        while part := list(islice(rest, batch)):
            yield batch, part


def paint(
    pipe: sdjax.Pipeline, orders: Sequence[Order], further: Mapping[str, Any], bars: Sequence[Progress]
) -> np.ndarray:
    """The pictures of one pass, in [0, 1].

    Args:
        pipe: that makes them.
        orders: which one call can make.
        further: keyword arguments of the call.
        bars: told of the network calls of the first pass and of the second.

    Raises:
        UserError: a setting or a file is not what it should be.
    """
    options = {**orders[0].options, **further, "first_index": orders[0].index}
    prompts = [order.prompt for order in orders]
    negatives = [order.options.get("negative_prompt") for order in orders]
    if "hires_strength" in options and "hires" not in options:
        raise UserError(f"--hires_strength {options['hires_strength']:g} changes nothing without --hires")
    scale, strength = options.pop("hires", None), options.pop("hires_strength", STRENGTH)
    options.pop("negative_prompt", None)
    if scale is not None:
        check_second_pass(pipe, scale, strength, options)
    first, *second = bars or [None]
    images = pipe(prompts, negatives, **options, progress=first)
    if scale is None or options.get("dry_run"):
        return images
    again = {"scale": scale, "strength": strength, "progress": second[0]}
    return repaint(pipe, images, prompts, negatives, **options, **again)


def advance(bar: tqdm, passes_left: int) -> Progress:
    """What a pass tells the bar, whose length is known once the first pass says how many calls it makes."""
    before: list[int] = []

    def progress(done: int, total: int) -> None:
        before.append(bar.n) if not before else None
        bar.total = max(before[0] + total * passes_left, bar.n)
        bar.set_description("sampling", refresh=False)
        bar.update(max(before[0] + done - bar.n, 0))

    return progress


def grid(images: list[np.ndarray]) -> np.ndarray:
    """All pictures in a nearly square grid, made smaller where they would be too many pixels."""
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    smaller = max(1, math.ceil(math.sqrt(len(images) * height * width / GRID_PIXELS)))
    padded = [np.pad(im, [(0, height - im.shape[0]), (0, width - im.shape[1]), (0, 0)]) for im in images]
    reduced = [np.asarray(Image.fromarray(image).reduce(smaller)) for image in padded]
    return tile(np.stack(reduced), math.ceil(math.sqrt(len(reduced))))


if __name__ == "__main__":
    run_together(main)
