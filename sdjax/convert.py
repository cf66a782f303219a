"""Writes a checkpoint in another layout.

    python -m sdjax.convert SOURCE [LORA:STRENGTH ...] TARGET [--dtype float16] [--family NAME] [--prediction NAME]
        [--variant fp16] [--weights ema|model] [--tokenizer FOLDER]
    python -m sdjax.convert SOURCE TARGET --extract_lora BASE [--rank 16] [--energy 0.99] [--naming kohya|diffusers]
        [--variant fp16]
    python -m sdjax.convert CONTROLNET TARGET [--dtype float16] [--control_transfer OLD,NEW]

SOURCE is a diffusers folder, a single .safetensors or .ckpt file in the original naming, an autoencoder alone in such a
file, or an id of the Hub (owner/name or owner/name/file.safetensors). TARGET is a single file in the original naming
where it ends in .safetensors, and a diffusers folder otherwise. Without --dtype each tensor keeps its type. --family
(sd1, sd2, sdxl, sdxl_refiner, x4_upscaler) and --prediction (epsilon, v_prediction, sample) say what a single file does
not; a .yaml of its name beside it is followed, too. --weights chooses between the UNet's weights and their average,
where a file has both.

A file may also hold one of the LDM paper's models (family celebahq, lsun_churches, cin256, cin_f8, text, text_f4,
layout, super_resolution, inpainting, semantic or rdm; averages are taken where it has them; --tokenizer is the folder
with BERT's vocab.txt), or ADM's UNet (adm_64, adm_128, adm_256, adm_512) or classifier. TARGET is then a new folder,
which sample.py, sdjax.load and, where it has the class, diffusers read.

Files of LoRA between the two are merged into Stable Diffusion's weights. --extract_lora writes what SOURCE has learned
beside BASE as a LoRA: each layer's difference by its --rank largest singular values, or by as few of them as keep the
share --energy of its squared norm; norms and biases stay out.

A ControlNet's folder, or a file of one in either naming, alone or with the model that it was trained on, becomes a
ControlNet's folder, or with .safetensors a file in the original naming. --control_transfer makes it one for another
base: the change from the model OLD, which it was trained with, to NEW is added to its copy of the encoder.
A file or folder that was not written here is never written over.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags

from sdjax.checkpoints.checkpoint import CLASSIFIERS, Checkpoint, Component, ReadOptions
from sdjax.checkpoints.controlnets import (
    CONTROLNET,
    is_controlnet,
    read_controlnet,
    title_of,
    transfer,
    write_controlnet_file,
)
from sdjax.checkpoints.families import POOL, UNET
from sdjax.checkpoints.kinds import LDM, PIXELS, STABLE_DIFFUSION
from sdjax.checkpoints.layouts.diffusers import (
    absent_parts,
    check_target_folder,
    read_component,
    write_checkpoint,
    write_component,
)
from sdjax.checkpoints.layouts.original import detect, read_adm_classifier, read_autoencoder_file
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.checkpoints.lora.extraction import extract_lora
from sdjax.checkpoints.lora.patch import merge_loras
from sdjax.checkpoints.lora.writing import NAMINGS, rank_of, write_lora
from sdjax.checkpoints.open import kind_of, read_checkpoint, resolve
from sdjax.checkpoints.storage.safetensors import check_target_file
from sdjax.checkpoints.storage.weights import SUFFIXES, Source, Weights, read_file
from sdjax.core.errors import UserError, run_or_exit, unknown
from sdjax.core.files import atomic_write, check_writable
from sdjax.core.flags import parse_flags
from sdjax.core.precision import dtype_named
from sdjax.pipeline.load import find_lora

SINGLE = ".safetensors"
(CLASSIFIER,) = CLASSIFIERS
CHOICES = ("dtype", "family", "prediction", "weights", "tokenizer")
TRANSFER = "control_transfer"
EXTRACTED = "extract_lora"
EXTRACTION = (EXTRACTED, "rank", "energy", "naming")
RANK, MOST = 16, 2**16  # of an extracted LoRA, without an energy and with one
Options = Mapping[str, Any]


def main() -> None:
    """Reads the command line and converts."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sdjax").setLevel(logging.INFO)
    values = flags.FlagValues()
    for name in (*CHOICES, "variant", TRANSFER):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in (EXTRACTED, "naming"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_integer("rank", None, "", 1, flag_values=values)
    flags.DEFINE_float("energy", None, "", 0.0, 1.0, flag_values=values)
    source, *loras, target = parse_flags(values, sys.argv, __doc__, ("SOURCE", "TARGET"), more=True)
    target = Path(target).expanduser()
    if target.suffix in SUFFIXES:
        raise UserError(f"{target}: files are written as {SINGLE}; another name is a folder's")
    check_free(target)
    variant = values["variant"].value
    path = resolve(source, variant=variant)
    chosen = {name: values[name].value for name in CHOICES}
    extraction = {name: values[name].value for name in EXTRACTION if values[name].value is not None}
    if (loras or extraction) and ((EXTRACTED in extraction and loras) or is_controlnet(path)):
        raise UserError(f"--{EXTRACTED} takes one SOURCE, without LoRAs, and a ControlNet takes neither")
    if EXTRACTED in extraction:
        write_extracted(path, target, chosen, extraction, variant)
        return
    if extraction:
        raise UserError(f"--{next(iter(extraction))} changes nothing without --{EXTRACTED} BASE; leave it out")
    bases = values[TRANSFER].value
    if not loras and is_controlnet(path):
        convert_controlnet(path, target, chosen, bases)
        return
    if bases is not None:
        raise UserError(f"--{TRANSFER} {bases} is for ControlNets, and {path} is none; leave it out")
    if loras or path.is_dir():
        files = [find_lora(lora) for lora in loras]
        checkpoint = read_model(path, chosen, variant)
        write(target, merge_loras(files)(checkpoint) if files else checkpoint)
        return
    stored = read_file(path)
    read = next((read for holds, read in ALONE if holds(stored)), convert_checkpoint)
    read(stored, target, chosen)


def read_model(path: Path, chosen: Options, variant: str | None = None) -> Checkpoint:
    """A whole model of a folder or a file; a UserError for options that have no meaning for it."""
    if path.is_dir():
        check_unused(path, chosen, ("dtype", "prediction"))
        return read_checkpoint(path, dtype=chosen["dtype"], prediction=chosen["prediction"], variant=variant)
    stored = read_file(path)
    kind = kind_of(stored)
    check_unused(stored.path, chosen, OPTIONS[kind])
    if kind == STABLE_DIFFUSION:
        print(f"{stored.path}: {detect(stored, family=chosen['family'], prediction=chosen['prediction'])}")
    return read_checkpoint(stored, **chosen)


def write_extracted(path: Path, target: Path, chosen: Options, extraction: Options, variant: str | None = None) -> None:
    """The LoRA of what a model has learned beside another.

    Raises:
        UserError: the target is no file's name, the naming is unknown, or the models do not fit each other.
    """
    if target.suffix != SINGLE:
        raise UserError(f"{target}: a LoRA is written as {SINGLE}")
    naming = extraction.get("naming", "kohya")
    if naming not in NAMINGS:
        raise unknown("naming", naming, NAMINGS, "--naming")
    models = path, resolve(extraction[EXTRACTED], variant=variant)
    tuned, base = (read_model(one, {**chosen, "dtype": None}, variant) for one in models)
    energy = extraction.get("energy")
    factors = extract_lora(base, tuned, extraction.get("rank", RANK if energy is None else MOST), energy)
    kind = dtype_named(chosen["dtype"] or "float32")
    write_lora(target, base, factors, naming, dtype=kind)
    ranks = [rank_of(entry) for entry in factors.values()]
    print(f"{target}: a LoRA of {len(factors)} layers, rank {min(ranks)} to {max(ranks)}")


def check_unused(path: Path, chosen: Options, known: Collection[str]) -> None:
    """Refuses what has no meaning for a source.

    Raises:
        UserError: an option is given that is not among those `known`.
    """
    for name, value in chosen.items():
        if value is not None and name not in known:
            raise UserError(f"--{name} {value} is not for {path}; what is: {', '.join(f'--{name}' for name in known)}")


def is_autoencoder_file(source: Source) -> bool:
    """Tell whether a file holds an autoencoder in the original naming and no UNet.

    Raises:
        UserError: it cannot be read.
    """
    keys = list(read_file(source).tensors)
    named = any(re.fullmatch(r"(first_stage_model\.|vae\.)?decoder\.mid\..*", key) for key in keys)
    return named and not any(key.startswith(UNET) for key in keys)


def is_adm_classifier(source: Source) -> bool:
    """Tell whether a file holds a classifier of ADM's.

    Raises:
        UserError: it cannot be read.
    """
    tensors = read_file(source).tensors
    return POOL in tensors and kind_of(source) == PIXELS


def convert_autoencoder(stored: Weights, target: Path, chosen: Options) -> None:
    """An autoencoder alone."""
    check_unused(stored.path, chosen, ("dtype", "family"))
    component = read_autoencoder_file(stored, chosen["dtype"], family=chosen["family"] or "sd1")
    with atomic_write(fresh(target, "an autoencoder alone")) as partial:
        write_component(partial, "vae", component, None)
    print(f"{target}: the folder of an autoencoder, scaling factor {component.config.scaling_factor}")


def convert_controlnet(path: Path, target: Path, chosen: Options, bases: str | None) -> None:
    """A ControlNet, for another base where two are given."""
    check_unused(path, chosen, ("dtype",))
    net = read_controlnet(path, ReadOptions(chosen["dtype"]))
    if bases is not None:
        if bases.count(",") != 1:
            raise UserError(f"--{TRANSFER} {bases}: give two models, OLD,NEW")
        old, new = (unet_of(source).params for source in bases.split(","))
        net = replace(net, params=transfer(net.params, old, new, f"--{TRANSFER} {bases}"))
    if target.suffix == SINGLE:
        write_controlnet_file(target, net, None)
    else:
        with atomic_write(fresh(target, "a ControlNet")) as partial:
            write_component(partial, CONTROLNET, net, None)
    print(f"{target}: a ControlNet of {title_of(net.config)}")


def unet_of(source: str) -> Component:
    """The UNet of a model, its parameters as they are stored."""
    path = resolve(source, component="unet")
    if not path.is_dir():
        return read_checkpoint(path, dtype=None, optional=("vae",)).components["unet"]
    return read_component(path / "unet" if (path / "unet").is_dir() else path, "unet", None)


def convert_classifier(stored: Weights, target: Path, chosen: Options) -> None:
    """ADM's classifier."""
    check_unused(stored.path, chosen, ("dtype",))
    component = read_adm_classifier(stored, chosen["dtype"])
    with atomic_write(fresh(target, "a classifier")) as partial:
        write_component(partial / CLASSIFIER, CLASSIFIER, component, None)
    print(f"{target}: the folder of a classifier of {component.config.size} pixels")


def convert_checkpoint(stored: Weights, target: Path, chosen: Options) -> None:
    """A whole model."""
    write(target, read_model(stored.path, chosen))


# What a file may hold beside a whole model, and how it is converted.
ALONE: tuple[tuple[Callable[[Weights], bool], Callable[[Weights, Path, Options], None]], ...] = (
    (is_autoencoder_file, convert_autoencoder),
    (is_adm_classifier, convert_classifier),
)
OPTIONS = {
    LDM: ("dtype", "family", "weights", "tokenizer"),
    PIXELS: ("dtype", "family"),
    STABLE_DIFFUSION: ("dtype", "family", "prediction", "weights"),
}


def write(target: Path, checkpoint: Checkpoint) -> None:
    """Writes the layout that the target's name asks for, and says what it lacks."""
    if checkpoint.conditioning != "text":
        write_checkpoint(fresh(target, "such a model"), checkpoint, None)
        size = checkpoint.components["unet"].extra.get("sample_size")
        kind = checkpoint.conditioning if "vae" in checkpoint.components else f"images of {size} pixels"
        print(f"{target}: a folder of a model of {kind}")
    elif target.suffix == SINGLE:
        write_single_file(target, checkpoint, None)
        print(f"{target}: one file, without tokenizer and scheduler")
    else:
        write_checkpoint(target, checkpoint, None)
        print(f"{target}: a diffusers folder, without {', '.join(absent_parts(checkpoint))}")


def check_free(target: Path) -> None:
    """Holds the target to a name and a place that can be written, before anything is read or fetched.

    Raises:
        UserError: what is there was not written here, or the place takes no file.
    """
    (check_target_file if target.suffix == SINGLE else check_target_folder)(target)
    check_writable(target.parent)


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
