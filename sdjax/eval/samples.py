"""Images of many prompts, sampled into a folder: each with its prompt in a JSON file beside it, as of sample.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write, check_writable, write_text
from sdjax.core.untrusted import read_json
from sdjax.data.images import to_uint8
from sdjax.pipeline.pipeline import Pipeline


class Sampling(NamedTuple):
    """Settings of the samples; None leaves the choice to the model.

    Attributes:
        images: of each prompt.
        batch_size: images at a time.
    """

    images: int = 1
    seed: int = 0
    batch_size: int = 16
    steps: int | None = None
    guidance_scale: float | None = None

    def options(self) -> dict[str, Any]:
        """Options of a call; prompts are read as they stand."""
        named = {"steps": self.steps, "guidance_scale": self.guidance_scale}
        return {"seed": self.seed, "syntax": "plain"} | {k: v for k, v in named.items() if v is not None}


def image_file(folder: Path, number: int) -> Path:
    """The name of a sample: those of the first prompt come first."""
    return folder / f"{number:05d}.png"


def write_samples(pipe: Pipeline, prompts: Sequence[str], folder: Path, how: Sampling) -> None:
    """Sample `how.images` of each prompt; those that an earlier, stopped run of the same wrote are kept.

    Raises:
        UserError: the model takes no prompts or not these settings, the folder cannot be written, or has images of
            others.
    """
    rows = pipe.prepare(list(prompts), num_images=how.images, **how.options())
    records = [
        {"prompt": prompts[i // how.images], "model": pipe.name, "index": i, **how.options()} for i in range(len(rows))
    ]
    check_writable(folder)
    left = [i for i, record in enumerate(records) if not _is_there(image_file(folder, i), record)]
    with tqdm(total=len(left), desc=pipe.name, unit="image") as bar:
        for place, image in pipe.run([rows[i] for i in left], how.batch_size):
            path = image_file(folder, left[place])
            write_text(path.with_suffix(".json"), json.dumps(records[left[place]], indent=2) + "\n")
            write_image(path, to_uint8(image))
            bar.update()


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_write(path) as partial:
        Image.fromarray(image).save(partial, "PNG")


def _is_there(path: Path, record: Mapping[str, Any]) -> bool:
    if not path.is_file():
        return False
    if read_json(path.with_suffix(".json")) != record:
        raise UserError(f"{path} is an image of another prompt, model or setting; choose another --folder")
    return True
