"""Weights of networks that judge pictures: which files hold them, where they are looked for, and what they become."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints.mapping import KeyTable, Stored, read
from sdjax.checkpoints.networks import inception, perceptual
from sdjax.checkpoints.storage.safetensors import read_safetensors
from sdjax.checkpoints.storage.weights import read_file
from sdjax.core.assets import ASSETS
from sdjax.core.caches import cache_folder
from sdjax.core.errors import UserError

FOLDER = "SDJAX_WEIGHTS"
LINEAR = ASSETS / "lpips" / "vgg.safetensors"


class Published(NamedTuple):
    """Weights that others publish.

    Attributes:
        title: what they are, for messages.
        files: names under which they are known, the customary one first.
        url: of the first file, as its publisher has it.
        table: of `rules`.
        shapes: of the parameters.
        ours: tensors that come with this package.
    """

    title: str
    files: tuple[str, ...]
    url: str
    table: Callable[[], KeyTable]
    shapes: Callable[[], Mapping[str, Any]]
    ours: Callable[[], Mapping[str, Stored]] = dict


PUBLISHED = {
    "vgg16": Published(
        "VGG16, of ImageNet",
        ("vgg16-397923af.pth", "vgg16.safetensors"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        lambda: perceptual.LPIPS_TABLE,
        perceptual.lpips_shapes,
        lambda: read_safetensors(LINEAR),
    ),
    "inception": Published(
        "Inception v3, FID's",
        (
            "pt_inception-2015-12-05-6726825d.pth",
            "weights-inception-2015-12-05-6726825d.pth",
            "inception-2015-12-05.safetensors",
        ),
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        inception.table,
        inception.shapes,
    ),
}


def folders() -> list[Path]:
    """The folders where weights are looked for: $SDJAX_WEIGHTS, this project's cache, PyTorch's cache of downloads.

    They may be other users': nothing of a file there is run.
    """
    own = [Path(os.environ[FOLDER]).expanduser()] if os.environ.get(FOLDER) else []
    cache = cache_folder("weights")
    torch = Path(os.environ.get("TORCH_HOME") or cache.parents[1] / "torch").expanduser()
    return [*own, cache, torch / "hub" / "checkpoints"]


def find(name: str) -> Path | None:
    """The file with the weights of one of `PUBLISHED`, if it is anywhere."""
    places = (folder / file for folder in folders() for file in PUBLISHED[name].files)
    return next((path for path in places if path.is_file()), None)


def missing(name: str) -> str:
    """The message for where `find` finds nothing."""
    wanted, (first, *others) = PUBLISHED[name], folders()
    return (
        f"no weights of {wanted.title}: download {wanted.url} to {first / wanted.files[0]} (also looked for in "
        f"{', '.join(map(str, others))}; ${FOLDER} names another folder)"
    )


def load(name: str) -> dict[str, Any]:
    """The parameters of one of `PUBLISHED`, float32.

    Raises:
        UserError: the file is nowhere, or does not hold them.
    """
    path = find(name)
    if path is None:
        raise UserError(missing(name))
    wanted = PUBLISHED[name]
    return read(wanted.table(), {**wanted.ours(), **read_file(path).tensors}, wanted.shapes(), np.float32, path)
