"""Images of a class that a model generates before it learns anything else, for `sdjax.tasks.prior`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write, recover
from sdjax.core.tree import Params
from sdjax.data.images import to_uint8
from sdjax.data.sources.image_files import SUFFIXES
from sdjax.diffusion_model.model import DiffusionModel
from sdjax.parallel.distributed import agreed, is_first, sync
from sdjax.tasks.conditions import TrainingCondition
from sdjax.tasks.preview import prompt_columns, sample_columns
from sdjax.tasks.prior import has_prior
from sdjax.training.progress import announce

AT_ONCE = 4
NAME = re.compile(r"class_(\d{5,9})\..*")


def make_class_images(config: Config, model: DiffusionModel, condition: TrainingCondition, params: Params) -> None:
    """Generate images of the class until there are `config.data.class_images`; no file is written over.

    Image i depends on the seed and on i alone: a run that was stopped goes on with the next one.

    Raises:
        UserError: there is no prompt, or the folder cannot be written.
    """
    data = config.data
    if not has_prior(config):
        return
    if condition.text is None or not data.class_prompt:
        raise UserError(f"config.data.class_prompt={data.class_prompt!r}: give the prompt of the class's images")
    folder = Path(data.class_folder).expanduser()
    start, count = json.loads(agreed(json.dumps(missing(folder, data.class_images)) if is_first() else ""))
    if not count:
        return
    announce("%s: %s images of %r are generated", folder, count, data.class_prompt)
    columns, size = prompt_columns(config, model, condition, (data.class_prompt,) * AT_ONCE), (data.size, data.size)
    for first in range(start, start + count, AT_ONCE):
        images = to_uint8(sample_columns(config, model, params, columns, size, first))
        for number, image in zip(range(first, start + count) if is_first() else (), images, strict=False):
            with atomic_write(folder / f"class_{number:05d}.png") as partial:
                Image.fromarray(image).save(partial, "PNG")
    sync("class images")


def missing(folder: Path, count: int) -> tuple[int, int]:
    """The number after those of all generated images, and how many images a folder lacks."""
    if not folder.is_dir():
        return 0, count
    recover(folder)
    names = [path.name for path in folder.rglob("*")]
    numbers = [int(match[1]) for name in names if (match := NAME.fullmatch(name))]
    found = sum(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in names)
    return max(numbers, default=-1) + 1, max(count - found, 0)
