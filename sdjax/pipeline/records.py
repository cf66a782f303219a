"""Pictures as files that say how they were made: A1111's `parameters` text in the PNG and a JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.core.errors import UserError

# What A1111's web UI, and with it every tool that reads its text, calls the samplers.
SAMPLER_LABELS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
}


def parameters(record: Mapping[str, Any]) -> str:
    """A record as A1111 writes it: the prompt, the negative prompt, then a line of settings.

    Args:
        record: prompt, negative_prompt, index, model, and the fields of `Settings`.
    """
    settings = {
        "Steps": record["steps"],
        "Sampler": SAMPLER_LABELS.get(record["sampler"], record["sampler"]),
        "Schedule type": record["schedule"] and record["schedule"].capitalize(),
        "CFG scale": f"{record['guidance_scale']:g}",
        "CFG Rescale": f"{record['guidance_rescale']:g}" if record["guidance_rescale"] else None,
        "Eta": record["eta"],
        "Seed": record["seed"],
        "Image index": record["index"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
        "Denoising strength": record["strength"],
    }
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def write_picture(path: Path, image: UInt8[np.ndarray, "h w 3"], record: Mapping[str, Any]) -> None:
    """Writes `path`, a PNG, and the record as JSON under the same name.

    Raises:
        UserError: one of the two exists, or the folder cannot be written.
    """
    text = PngInfo()
    text.add_text("parameters", parameters(record))
    _write_png(path, image, text)
    with _new(path.with_suffix(".json")) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def write_grid(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a PNG without settings.

    Raises:
        UserError: as `write_picture`.
    """
    _write_png(path, image, PngInfo())


def check_free(folder: Path, names: Iterable[str], advice: str) -> None:
    """Raises a UserError if the folder is a file, or holds one of the names already; its end is the advice."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; {advice}")
    for name in names:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists and is left as it is; {advice}")


def fresh_folder(parent: Path) -> Path:
    """A folder in `parent` that was not there: 0000, 0001, ...; it is made.

    Raises:
        UserError: it cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = len(list(parent.iterdir()))
        while True:
            try:
                (parent / f"{number:04d}").mkdir()
            except FileExistsError:
                number += 1
            else:
                return parent / f"{number:04d}"
    except OSError as error:
        raise UserError(f"cannot make a folder in {parent}: {error.strerror}") from error


def _write_png(path: Path, image: np.ndarray, text: PngInfo) -> None:
    with _new(path) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=text)


def _new(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")
    except FileExistsError as error:
        raise UserError(f"{path} exists and is left as it is") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
