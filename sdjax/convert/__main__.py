"""Writes a checkpoint in another layout.

    python -m sdjax.convert SOURCE TARGET [--dtype float16] [--family NAME] [--prediction NAME] [--variant fp16]
        [--weights ema|model] [--tokenizer FOLDER]

SOURCE is a diffusers folder, a single .safetensors or .ckpt file in the original naming, an autoencoder alone in such a
file, or an id of the Hub (owner/name or owner/name/file.safetensors). TARGET is a single file in the original naming
where it ends in .safetensors, and a diffusers folder otherwise. Without --dtype each tensor keeps its type. --family
(sd1, sd2, sdxl, sdxl_refiner, x4_upscaler) and --prediction (epsilon, v_prediction) say what a single file does not.
--weights chooses between the UNet's weights and their average, where a file has both.

A file may also hold one of the LDM paper's models (family celebahq, lsun_churches, cin256, cin_f8, text, text_f4,
layout, super_resolution, inpainting, semantic or rdm; averages are taken where it has them; --tokenizer is the folder
with BERT's vocab.txt), or ADM's UNet (adm_64, adm_128, adm_256, adm_512) or classifier. TARGET is then a new folder,
which sample.py, sdjax.load_conditional and, where it has the class, diffusers read.
A file or folder that was not written here is never written over.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from absl import flags

from sdjax.convert.adm_file import is_adm_classifier, is_adm_file, read_adm_classifier, read_adm_file
from sdjax.convert.components import CLASSIFIERS, Checkpoint
from sdjax.convert.ddpm_folder import write_ddpm
from sdjax.convert.families import PREDICTIONS
from sdjax.convert.folder import absent_parts, read_folder, write_component, write_folder
from sdjax.convert.hub import resolve
from sdjax.convert.ldm_file import holds_ldm, read_ldm_file
from sdjax.convert.ldm_folder import write_ldm
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
(CLASSIFIER,) = CLASSIFIERS
Options = Mapping[str, str | None]


def main() -> None:
    """Reads the command line and converts."""
    values = flags.FlagValues()
    for name in ("dtype", "family", "prediction", "variant", "weights", "tokenizer"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    source, target = parse_flags(values, sys.argv, __doc__, ("SOURCE", "TARGET"))
    target = Path(target).expanduser()
    if target.suffix in SUFFIXES:
        raise UserError(f"{target}: files are written as {SINGLE}; another name is a folder's")
    path = resolve(source, variant=values["variant"].value)
    chosen = {name: values[name].value for name in ("dtype", "family", "prediction", "weights", "tokenizer")}
    if path.is_dir():
        check_unused(path, chosen, ("dtype", "prediction"))
        checkpoint = read_folder(path, chosen["dtype"], variant=values["variant"].value)
        write(target, with_prediction(checkpoint, chosen["prediction"]))
        return
    read = next(read for holds, read in KINDS if holds(path))
    read(path, target, chosen)


def check_unused(path: Path, chosen: Options, known: Collection[str]) -> None:
    """Refuses what has no meaning for a source.

    Raises:
        UserError: an option is given that is not among those `known`.
    """
    for name, value in chosen.items():
        if value is not None and name not in known:
            raise UserError(f"--{name} {value} is not for {path}; what is: {', '.join(f'--{name}' for name in known)}")


def convert_autoencoder(path: Path, target: Path, chosen: Options) -> None:
    """An autoencoder alone."""
    check_unused(path, chosen, ("dtype", "family"))
    component = read_autoencoder_file(path, chosen["dtype"], family=chosen["family"] or "sd1")
    write_component(fresh(target, "an autoencoder alone"), "vae", component, None)
    print(f"{target}: the folder of an autoencoder, scaling factor {component.config.scaling_factor}")


def convert_ldm(path: Path, target: Path, chosen: Options) -> None:
    """One of the LDM paper's models."""
    check_unused(path, chosen, ("dtype", "family", "weights", "tokenizer"))
    family, weights, tokenizer = (chosen[name] for name in ("family", "weights", "tokenizer"))
    checkpoint = read_ldm_file(path, chosen["dtype"], family=family, weights=weights, tokenizer=tokenizer)
    write_ldm(fresh(target, "such a model"), checkpoint, None)
    print(f"{target}: a folder of a model of {checkpoint.task}")


def convert_adm(path: Path, target: Path, chosen: Options) -> None:
    """ADM's UNet or classifier."""
    if is_adm_classifier(path):
        check_unused(path, chosen, ("dtype",))
        component = read_adm_classifier(path, chosen["dtype"])
        write_component(fresh(target, "a classifier") / CLASSIFIER, CLASSIFIER, component, None)
        print(f"{target}: the folder of a classifier of {component.config.size} pixels")
        return
    check_unused(path, chosen, ("dtype", "family"))
    checkpoint = read_adm_file(path, chosen["dtype"], family=chosen["family"])
    write_ddpm(fresh(target, "such a model"), checkpoint, None)
    print(f"{target}: a folder of a model of pictures of {checkpoint.unet.extra['sample_size']} pixels")


def convert_stable_diffusion(path: Path, target: Path, chosen: Options) -> None:
    """A file of Stable Diffusion's family."""
    check_unused(path, chosen, ("dtype", "family", "prediction", "weights"))
    family, prediction, weights = (chosen[name] for name in ("family", "prediction", "weights"))
    print(f"{path}: {detect(path, family=family, prediction=prediction)}")
    dtype, weights = chosen["dtype"], weights or "model"
    write(target, read_single_file(path, dtype, family=family, prediction=prediction, weights=weights))


# What a file may hold, and how it is converted; the last takes whatever is left, and says what it looks like.
KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path, Path, Options], None]], ...] = (
    (is_autoencoder_file, convert_autoencoder),
    (holds_ldm, convert_ldm),
    (is_adm_file, convert_adm),
    (Path.is_file, convert_stable_diffusion),
)


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


def fresh(target: Path, what: str) -> Path:
    """The target, which must be the name of a new folder.

    Raises:
        UserError: it is a file's name, or exists and is not empty.
    """
    if target.suffix == SINGLE or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: {what} is written as a new folder")
    return target


if __name__ == "__main__":
    run_or_exit(main)
