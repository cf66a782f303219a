"""Sample images with a trained model.

    python sample.py --config configs/NAME.py --prompt TEXT [--prompt TEXT ...] | --from_file FILE | --from_image FILE

Jobs
    --prompt TEXT            in A1111's syntax: (word:1.2), [word], BREAK; [from:to:when] and [a|b], which change from
                             step to step; a cat AND a dog :0.8; {{red|blue}} and __name__ (--wildcard_dir), which draw
                             words for each image by its seed; <lora:name:0.8>, of --lora and --lora_dir; models of
                             classes, layouts, label maps or images take none
    --from_file FILE         one prompt a line, with its own settings after it: a red heart --steps 20 --seed 3
    --from_image FILE        makes an image again from the settings inside it, of this program, A1111, Forge, SD.Next,
                             ComfyUI, Fooocus, InvokeAI or NovelAI (PNG, JPEG, WebP); further flags change them
    --grid "steps=10,20;sampler=euler,dpmpp_2m"      every combination, and a labelled sheet of them
    --outdir DIR             without it, a new folder of outputs/; images that a killed run of the same command left in
                             it are kept

Model
    --checkpoint SOURCE      a Hub id, a diffusers folder, a file (.safetensors, .ckpt, .pt), or the workdir of a
                             finished train.py run
{load}
Options of an image; None leaves the choice to the checkpoint
{image}
Several hosts
    as train.py: SLURM, Open MPI and TPU pods are recognised, elsewhere --coordinator HOST:PORT --processes N
    --process_id I. All devices make every batch together, and each process writes its share of the files into the one
    folder.

Files are 00000.png, 00001.png, ... in the order of the prompts, each with its settings inside and in a JSON beside it,
and grid.png when there are several. The same seed, prompt and place in that order give the same image. Any value of
the config can be set: --config.sample.dtype=bfloat16.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

import sdjax
from sdjax.cli.grids import Axis, cells, contact_sheet, parse_grid, sheet
from sdjax.cli.jobs import ImageJob, expand_jobs, prepare_jobs, suit_encoder
from sdjax.cli.outputs import Found, find_outputs, image_path, new_folder, open_folder, write_grid
from sdjax.cli.prompt_files import PromptLine, read_prompt_file
from sdjax.cli.records import write_image
from sdjax.cli.settings.read import read_settings
from sdjax.core.compilation import keep_compiled
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.flags import PROCESSES, define_processes, parse_flags
from sdjax.data.images import to_uint8
from sdjax.parallel.distributed import agreed, end_by_signals, initialise, is_first, is_mine, run_together, sync
from sdjax.parallel.mesh import make_mesh
from sdjax.pipeline.options import LOAD_OPTIONS, OPTIONS, help_of, parse_value

IMAGE = {name: option for name, option in OPTIONS.items() if option.scope == "image"}
FLAGS = {**IMAGE, "batch_size": OPTIONS["batch_size"]}
SOURCES = ("checkpoint", *LOAD_OPTIONS)
JOBS = ("from_file", "from_image", "grid", "outdir")

logger = logging.getLogger("sdjax")


class Request(NamedTuple):
    """A command line's request.

    Attributes:
        jobs: every image.
        axes: of a grid; () without one.
        sources: checkpoint and options of `sdjax.load`.
        outdir: None for a new folder.
        batch_size: images of one pass; None suits their size.
        penultimate: options of an image's own settings, and their values for models other than Stable Diffusion 1.
    """

    jobs: list[ImageJob]
    axes: tuple[Axis, ...]
    sources: dict[str, Any]
    outdir: Path | None
    batch_size: int | None = None
    penultimate: Mapping[str, tuple[Any, Any]] = {}


def main() -> None:
    """Read the command line, sample, and print the folder of the images."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sdjax").setLevel(logging.INFO)
    config, flag = read_command_line(sys.argv)
    request = read_request(config, flag)
    keep_compiled()
    end_by_signals()
    initialise(**{name: flag[name] for name in PROCESSES})
    folder = generate_all(request, *load(request.sources, config))
    if is_first():
        print(folder)


def read_command_line(argv: list[str]) -> tuple[Config, dict[str, Any]]:
    """The config, and the flags by name; None where one was not given.

    Raises:
        UserError: a flag is missing or unknown, or has a wrong value.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    many = {"prompt", *(name for name, option in {**FLAGS, **LOAD_OPTIONS}.items() if option.many)}
    for name in (*FLAGS, "checkpoint", "prompt", *JOBS, *LOAD_OPTIONS):
        define = flags.DEFINE_multi_string if name in many else flags.DEFINE_string
        define(name, None, "", flag_values=values)
    flags.DEFINE_alias("embedding", "embeddings", flag_values=values)
    define_processes(values)
    parse_flags(values, argv, str(__doc__).format(load=help_of(LOAD_OPTIONS), image=help_of(FLAGS)))
    flag: dict[str, Any] = {name: values[name].value for name in values if name != "embedding"}
    config = flag.pop("config")
    if config is None:
        raise UserError("--config is required")
    for name in FLAGS:
        flag[name] = None if flag[name] is None else parse_value(name, flag[name], f"--{name}")
    return config, flag


def read_request(config: Config, flag: Mapping[str, Any]) -> Request:
    """Jobs and sources: flags win over a given image's own record, and that over the config.

    Raises:
        UserError: a file or the grid cannot be read, or two flags exclude each other.
    """
    if flag["prompt"] is not None and flag["from_file"] is not None:
        raise UserError("give one of --prompt, --from_file and --from_image")
    given = {name: value for name, value in flag.items() if value is not None}
    axes = parse_grid(flag["grid"]) if flag["grid"] is not None else ()
    record, penultimate, settings = {}, {}, dict(cast(Any, config.sample))
    if flag["from_image"] is not None:
        found = read_settings(flag["from_image"], {*given, *(axis.name for axis in axes)})
        record, penultimate = found.values, found.penultimate
        # Of the config only the model counts, for images that do not name theirs.
        settings = {name: settings[name] for name in ("checkpoint", "dtype") if name in settings} | record
        # The files that an image names are read on its word.
        for name in (*SOURCES, *(name for name, option in FLAGS.items() if option.file)):
            if record.get(name):
                logger.info("%s: %s %s", flag["from_image"], name, record[name])
    settings |= given
    if flag["from_file"] is not None:
        lines = read_prompt_file(Path(flag["from_file"]))
    else:
        lines = [PromptLine(prompt, {}) for prompt in flag["prompt"] or [record.get("prompt")]]
    common = {name: settings[name] for name in IMAGE if settings.get(name) is not None and name != "first_index"}
    first = flag["first_index"] if flag["first_index"] is not None else record.get("index") or 0
    return Request(
        jobs=expand_jobs(lines, common, cells(axes) if axes else [{}], first),
        axes=axes,
        sources={name: settings[name] for name in SOURCES if settings.get(name)},
        outdir=None if flag["outdir"] is None else Path(flag["outdir"]),
        batch_size=flag["batch_size"],
        penultimate={name: (record[name], value) for name, value in penultimate.items() if name not in given},
    )


def load(sources: Mapping[str, Any], config: Config) -> tuple[sdjax.Pipeline, dict[str, Any]]:
    """The pipeline, and what every record says of it; a UserError where a checkpoint cannot be read."""
    if "checkpoint" not in sources:
        raise UserError("this config has no sample.checkpoint; give --checkpoint")
    mesh = make_mesh(cast(Any, config.mesh)) if jax.device_count() > 1 else None
    options = {"dtype": "float32", **{name: sources[name] for name in LOAD_OPTIONS if name in sources}}
    source = sources["checkpoint"]
    beside = Path(__file__).parent / source  # a checkpoint of a config may be given relative to this script
    pipe = sdjax.load(str(beside) if beside.exists() and not Path(source).exists() else source, mesh=mesh, **options)
    return pipe, {**sources, "dtype": options["dtype"], "model": pipe.name}


def generate_all(request: Request, pipe: sdjax.Pipeline, sources: Mapping[str, Any]) -> Path:
    """Sample and write all images but those that a killed run of the same command left; return their folder.

    Raises:
        UserError: a setting or a file is not what it should be; nothing has been overwritten.
    """
    jobs, outdir = suit_encoder(pipe, request.jobs, request.penultimate), request.outdir
    rows = prepare_jobs(pipe, jobs)
    records = {job.number: {**row.settings, **sources, "index": job.index} for job, row in zip(jobs, rows, strict=True)}
    found = Found() if outdir is None else find_outputs(outdir, records)
    sync("outdir checked")
    if outdir is None:  # a new folder that the first process makes for all
        outdir = Path(agreed(str(new_folder(Path("outputs") / pipe.name)) if is_first() else ""))
    if is_first():
        open_folder(outdir, records, found)
    made, places = dict(found.images), [i for i, job in enumerate(jobs) if job.number not in found.images]
    try:
        with tqdm(desc="compiling", unit="call", dynamic_ncols=True, disable=not is_first()) as bar:
            for place, image in pipe.run([rows[i] for i in places], request.batch_size, advance(bar)):
                number, pixels = jobs[places[place]].number, to_uint8(image)
                if is_mine(number):
                    write_image(image_path(outdir, number), pixels, records[number])
                made[number] = pixels
    except (KeyboardInterrupt, UserError):
        if made:
            logger.info("%d of %d images are in %s; --outdir %s goes on", len(made), len(jobs), outdir, outdir)
        raise
    if len(made) > 1 and is_first() and not found.grid:
        images = [made[number] for number in sorted(made)]
        write_grid(outdir, contact_sheet(images, request.axes) if request.axes else sheet(images), records)
    return outdir


def advance(bar: tqdm) -> Any:
    """A pipeline's progress on a bar, whose length is known with the first network call.

    That call is compiled before: the time left is that of the others.
    """

    def progress(done: int, total: int) -> None:
        if bar.total is None:
            bar.reset(total)
            bar.initial = bar.n = done
        bar.set_description("sampling")
        bar.update(done - bar.n)

    return progress


if __name__ == "__main__":
    run_together(main)
