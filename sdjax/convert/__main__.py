"""Writes a checkpoint in another layout.

    python -m sdjax.convert SOURCE TARGET [--dtype float16] [--family NAME] [--prediction NAME] [--variant fp16]

SOURCE is a diffusers folder, a single .safetensors or .ckpt file in the original naming, an autoencoder alone in such a
file, or an id of the Hub (owner/name or owner/name/file.safetensors). TARGET is a single file in the original naming
where it ends in .safetensors, and a diffusers folder otherwise. Without --dtype each tensor keeps its type. --family
(sd1, sd2, sdxl, sdxl_refiner, x4_upscaler) and --prediction (epsilon, v_prediction) say what a single file does not.
A file or folder that was not written here is never written over.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from absl import flags

from sdjax.convert.components import Checkpoint, Component
from sdjax.convert.families import PREDICTIONS
from sdjax.convert.folder import absent_parts, read_folder, write_component, write_folder
from sdjax.convert.hub import resolve
from sdjax.convert.pickles import SUFFIXES
from sdjax.convert.single_file import (
    detect,
    is_autoencoder_file,
    read_autoencoder_file,
    read_single_file,
    write_single_file,
)
from sdjax.core.errors import UserError, run_or_exit, unknown
from sdjax.core.flags import parse_flags

SINGLE = ".safetensors"


def main() -> None:
    """Reads the command line and converts."""
    values = flags.FlagValues()
    for name in ("dtype", "family", "prediction", "variant"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    source, target = parse_flags(values, sys.argv, __doc__, ("SOURCE", "TARGET"))
    target = Path(target).expanduser()
    if target.suffix in SUFFIXES:
        raise UserError(f"{target}: files are written as {SINGLE}; another name is a folder's")
    path = resolve(source, variant=values["variant"].value)
    dtype, family, prediction = (values[name].value for name in ("dtype", "family", "prediction"))
    if path.is_file() and is_autoencoder_file(path):
        write_autoencoder(target, read_autoencoder_file(path, dtype, family=family or "sd1"))
    elif path.is_dir():
        if family is not None:
            raise UserError(f"--family {family} is for single files; the folder {path} says what it is")
        write(target, with_prediction(read_folder(path, dtype, variant=values["variant"].value), prediction))
    else:
        print(f"{path}: {detect(path, family=family, prediction=prediction)}")
        write(target, read_single_file(path, dtype, family=family, prediction=prediction))


def with_prediction(checkpoint: Checkpoint, prediction: str | None) -> Checkpoint:
    """The checkpoint with another `prediction_type` in its scheduler's config; None leaves it.

    Raises:
        UserError: there is no such prediction type.
    """
    if prediction is None:
        return checkpoint
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    scheduler = {**checkpoint.scheduler_config, "prediction_type": PREDICTIONS[prediction]}
    return dataclasses.replace(checkpoint, scheduler_config=scheduler)


def write(target: Path, checkpoint: Checkpoint) -> None:
    """Writes the layout that the target's name asks for, and says what it lacks."""
    if target.suffix == SINGLE:
        write_single_file(target, checkpoint, None)
        print(f"{target}: one file, without tokenizer and scheduler")
        return
    write_folder(target, checkpoint, None)
    print(f"{target}: a diffusers folder, without {', '.join(absent_parts(checkpoint))}")


def write_autoencoder(target: Path, component: Component) -> None:
    """Writes a folder with one network.

    Raises:
        UserError: the target is a file's name, or exists and is not empty.
    """
    if target.suffix == SINGLE or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: an autoencoder alone is written as a new folder")
    write_component(target, "vae", component, None)
    print(f"{target}: the folder of an autoencoder, scaling factor {component.config.scaling_factor}")


if __name__ == "__main__":
    run_or_exit(main)
