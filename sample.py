"""Makes pictures with a trained model.

    python sample.py --config configs/NAME.py --prompt TEXT [--prompt TEXT ...] | --from_file PROMPTS.txt
        [--negative_prompt TEXT] [--seed 0] [--steps N] [--guidance_scale S] [--sampler NAME] [--schedule NAME]
        [--width W --height H] [--num_images N] [--checkpoint SOURCE] [--init_image FILE --strength S] [--mask FILE]
        [--first_index N] [--outdir DIR] [--config.section.key=value]

PROMPTS.txt holds one prompt a line. SOURCE is a diffusers folder or the workdir of a finished train.py run. Files are
00000.png, 00001.png, ... in the order of the prompts, each with its settings inside and in a JSON beside it, and
grid.png when there are several; without --outdir, in a new folder of outputs/. The same seed, prompt and place in that
order give the same picture; --first_index 3 makes the fourth alone.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image
from tqdm import tqdm

import sdjax
from sdjax.core.config import Config
from sdjax.core.errors import UserError, run_or_exit
from sdjax.core.flags import parse_flags
from sdjax.parallel.mesh import make_mesh
from sdjax.pipeline.records import check_free, fresh_folder, write_grid, write_picture
from sdjax.tasks.base import tile, to_uint8

TEXTS = ("checkpoint", "from_file", "init_image", "mask", "negative_prompt", "outdir", "sampler", "schedule")
INTEGERS = ("steps", "width", "height")
GRID_PIXELS = 2**25


def main() -> None:
    """Reads the command line, samples, and says where the pictures are."""
    config, flag = read_command_line(sys.argv)
    print(sample(config, flag))


def read_command_line(argv: list[str]) -> tuple[Config, dict[str, Any]]:
    """The config, and the flags by name; None where one was not given.

    Raises:
        UserError: a flag is missing, unknown or does not go with another.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "what to paint", flag_values=values)
    for name in TEXTS:
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in INTEGERS:
        flags.DEFINE_integer(name, None, "", flag_values=values)
    for name, default in (("seed", 0), ("num_images", 1), ("first_index", 0)):
        flags.DEFINE_integer(name, default, "", flag_values=values)
    for name, default in (("guidance_scale", None), ("strength", 0.75)):
        flags.DEFINE_float(name, default, "", flag_values=values)
    parse_flags(values, argv, __doc__)
    flag: dict[str, Any] = {name: values[name].value for name in values}
    config = flag.pop("config")
    if config is None:
        raise UserError("--config is required")
    if (flag["prompt"] is None) == (flag["from_file"] is None):
        raise UserError("give either --prompt or --from_file")
    if flag["mask"] is not None and flag["init_image"] is None:
        raise UserError("--mask needs an --init_image whose unmasked part is kept")
    if flag["num_images"] < 1:
        raise UserError(f"--num_images {flag['num_images']}: choose at least 1")
    return config, flag


def sample(config: Config, flag: dict[str, Any]) -> Path:
    """Makes and writes all pictures; returns their folder.

    Raises:
        UserError: a flag, a file or the checkpoint is not what it should be; nothing has been overwritten.
    """
    # ---- what to paint, with which model ----
    defaults, axes = cast(Any, config.sample), cast(Any, config.mesh)
    prompts = flag["prompt"] or read_prompts(Path(flag["from_file"]))
    prompts = [prompt for prompt in prompts for _ in range(flag["num_images"])]
    source = flag["checkpoint"] or shipped(defaults)
    mesh = make_mesh(axes) if jax.device_count() > 1 else None
    pipe = sdjax.load(source, defaults.get("dtype", "float32"), mesh)

    # ---- how: the flags, then the config, then the checkpoint ----
    names = ("steps", "guidance_scale", "sampler", "schedule", "width", "height")
    chosen = {name: defaults.get(name) if flag[name] is None else flag[name] for name in names}
    chosen |= {"seed": flag["seed"]}
    settings = pipe.settings(**chosen, strength=flag["strength"] if flag["init_image"] else None)
    given = {name: flag[name] for name in ("negative_prompt", "init_image", "mask")}
    record = {**dataclasses.asdict(settings), **given, "model": pipe.name, "checkpoint": str(source)}
    outdir = None if flag["outdir"] is None else Path(flag["outdir"])
    if outdir is not None:
        files = [f"{flag['first_index'] + i:05d}.{end}" for i in range(len(prompts)) for end in ("png", "json")]
        check_free(outdir, files + ["grid.png"] * (len(prompts) > 1), "choose another --outdir")

    # ---- a pass at a time; what is made is on disk before the next begins ----
    made: list[np.ndarray] = []
    given["strength"] = flag["strength"]
    batch = pipe.batch_size(len(prompts), settings.height, settings.width)
    with tqdm(desc="compiling", unit="call", dynamic_ncols=True) as bar:
        for first in range(0, len(prompts), batch):
            part, index = prompts[first : first + batch], flag["first_index"] + first
            progress = advance(bar, first // batch, math.ceil(len(prompts) / batch))
            images = pipe(part, **chosen, **given, first_index=index, batch_size=batch, progress=progress)
            outdir = outdir or fresh_folder(Path("outputs") / pipe.name)
            for i, (prompt, image) in enumerate(zip(part, to_uint8(images), strict=True), index):
                write_picture(outdir / f"{i:05d}.png", image, {"prompt": prompt, "index": i, **record})
                made.append(image)
    assert outdir is not None, "there is at least one prompt"
    if len(made) > 1:
        write_grid(outdir / "grid.png", grid(made))
    return outdir


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        UserError: it cannot be read, or there are none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read --from_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read --from_file {path}: it is not UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from_file {path} holds no prompt: write one a line")
    return prompts


def shipped(defaults: Any) -> str:
    """The checkpoint that the config names, which may be given relative to this script.

    Raises:
        UserError: it names none.
    """
    source = defaults.get("checkpoint")
    if not source:
        raise UserError("this config has no sample.checkpoint; give --checkpoint")
    beside = Path(__file__).parent / source
    return str(beside) if beside.exists() and not Path(source).exists() else source


def advance(bar: tqdm, passes_done: int, passes: int) -> Callable[[int, int], None]:
    """What a pass tells the bar, whose length is known once the first pass says how many calls it makes."""

    def progress(done: int, total: int) -> None:
        bar.total = total * passes
        bar.set_description("sampling", refresh=False)
        bar.update(total * passes_done + done - bar.n)

    return progress


def grid(images: list[np.ndarray]) -> np.ndarray:
    """All pictures in a nearly square grid, made smaller where they would be too many pixels."""
    smaller = math.ceil(math.sqrt(len(images) * images[0].size / 3 / GRID_PIXELS))
    cells = [np.asarray(Image.fromarray(image).reduce(smaller)) for image in images]
    return tile(np.stack(cells), math.ceil(math.sqrt(len(cells))))


if __name__ == "__main__":
    run_or_exit(main)
