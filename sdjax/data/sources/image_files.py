"""Images below a folder, found by their suffixes, in order of their names; their captions are files beside them.

Each such file is one caption, of however many lines. Names of folders are classes (torchvision's ImageFolder), and as
sd-scripts reads them: of N_NAME/a.png, NAME is the caption unless there is a N_NAME/a.txt, and each epoch has the image
N times. Where conditioning images are needed, they are in a folder beside that of the images (`PAIRS`), under the same
names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.untrusted import read_bytes
from sdjax.data.sources.annotations import LABEL
from sdjax.data.sources.base import CAPTION, CONDITIONING_IMAGE, read_text
from sdjax.data.sources.links import DataFolder
from sdjax.data.sources.listings import FILE_NAME

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SIDECARS = (".txt", ".caption")
PAIRS = {"conditioning_images": "images", "source": "target"}
"""Folders of conditioning images, and of their images: as Hugging Face's examples have them, as ControlNet's has."""
REPEATED = re.compile(r"(\d{1,6})_(.+)")
# Thumbnails and copies that systems keep beside a user's images, besides what begins with a dot.
HIDDEN = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"})


def is_hidden(name: str) -> bool:
    """True for the name of a file or folder that is no part of a data set, e.g. ._a.jpg and .ipynb_checkpoints."""
    return name.startswith(".") or name in HIDDEN


class ImageFiles:
    """A listing of the images below a folder; `label` is the folder in the folder, where each is in one.

    Attributes:
        repeats: times that an epoch has each image; None for once.
    """

    def __init__(self, folder: DataFolder, needs: Collection[str], concepts: bool, without: Collection[str] = ()):
        """Finds the files.

        Args:
            folder: all of them are in it.
            needs: captions and conditioning images are looked for where they are among them.
            concepts: N_NAME is read as sd-scripts does.
            without: names of files to leave out.
        """
        self._folder, captions = folder, CAPTION in needs
        found = sorted((Path(name), sidecar) for name, sidecar in _images(folder, captions) if name not in without)
        above, self._hints = _pairs([path for path, _ in found]) if CONDITIONING_IMAGE in needs else Pairs("", {})
        found = [(path, sidecar) for path, sidecar in found if path.is_relative_to(above)]
        self._names = [str(path) for path, _ in found]
        self._sidecars = [sidecar for _, sidecar in found]
        below = [path.relative_to(above) for path, _ in found]
        tops = [path.parts[0] if len(path.parts) > 1 else "" for path in below]
        parts = [REPEATED.fullmatch(top) if concepts else None for top in tops]
        self._concepts = [part[2] if part else "" for part in parts]
        self._labels = [concept or top for concept, top in zip(self._concepts, tops, strict=True)] if all(tops) else []
        self.repeats = np.array([int(part[1]) if part else 1 for part in parts]) if any(parts) else None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        name, row = self._names[index], {}
        if hint := self._hints.get(name):
            row[CONDITIONING_IMAGE] = hint
        if self._labels:
            row[LABEL] = self._labels[index]
        if sidecar := self._sidecars[index]:
            path = self._folder.file(str(Path(name).with_suffix(sidecar)), self.place(index))
            row["text"] = read_text(read_bytes(path), path)
        elif self._concepts[index]:
            row["text"] = self._concepts[index]
        return {FILE_NAME: name, **row}

    def lacks(self, entry: Mapping[str, Any], key: str) -> str:
        """A reason against an image that has no `key`."""
        name = Path(entry[FILE_NAME])
        if key == CAPTION:
            return f"has no caption: {' or '.join(name.with_suffix(kind).name for kind in SIDECARS)} is missing"
        if key == CONDITIONING_IMAGE:
            pairs = " or ".join(f"{hints}/ beside {images}/" for hints, images in PAIRS.items())
            return f"has no {key}: none of this name is in {pairs}"
        return f"has no {key}" + ": it is in no folder of its class" * (key == LABEL)

    def place(self, index: int) -> str:
        """The image's path, in one line."""
        path = str(self._folder.path / self._names[index])
        return path if path.isprintable() else repr(path)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


class Pairs(NamedTuple):
    """Images that have conditioning images.

    Attributes:
        images: the folder that all of them are in; "" for the data set's own.
        hints: file of each image's conditioning image, by the image's.
    """

    images: str
    hints: Mapping[str, str]


def _pairs(paths: Collection[Path]) -> Pairs:
    tops = {path.parts[0] for path in paths}
    for hints, images in PAIRS.items():
        if tops == {hints, images}:
            stems = {path.relative_to(hints).with_suffix(""): str(path) for path in paths if path.parts[0] == hints}
            own = {str(path): path.relative_to(images).with_suffix("") for path in paths if path.parts[0] == images}
            return Pairs(images, {name: stems[stem] for name, stem in own.items() if stem in stems})
    return Pairs("", {})


def _images(folder: DataFolder, captions: bool) -> Iterator[tuple[str, str]]:
    """(path below the folder, suffix of the file with its caption or "") of every image."""
    linked: set[str] = set()

    def enters(path: str) -> bool:
        """Links into the folder itself are left out, for what they lead to is found without them."""
        if not os.path.islink(path):
            return True
        real = os.path.realpath(path)
        inside = f"{real}{os.sep}".startswith(os.path.join(os.path.realpath(folder.path), ""))
        new = folder.holds(real) and not inside and real not in linked
        linked.update([real] * new)
        return new

    for parent, folders, files in os.walk(folder.path, followlinks=True, onerror=_refuse):
        folders[:] = [name for name in folders if not is_hidden(name) and enters(os.path.join(parent, name))]
        beside = set(files) if captions else ()
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES and not is_hidden(name):
                sidecar = next((kind for kind in SIDECARS if stem + kind in beside), "")
                yield os.path.relpath(os.path.join(parent, name), folder.path), sidecar
