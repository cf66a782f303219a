"""A folder of images: those that a list names with their annotations, or all of them."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.image_inputs import read_embeddings
from sdjax.data.images import image_size, read_conditioning_image, read_image, read_labels
from sdjax.data.sources.annotations import NOTHING, Annotations, arrays, names, parse_annotations
from sdjax.data.sources.base import CAPTION, CONDITIONING_IMAGE, Example, Problem, captioned, captions_of, keys_of
from sdjax.data.sources.image_files import SIDECARS, SUFFIXES, ImageFiles, is_hidden
from sdjax.data.sources.links import DataFolder
from sdjax.data.sources.listings import FILE_NAME, LISTINGS, Listing, find_listing
from sdjax.data.sources.rules import ANY, RowRules

# Control characters, which would divide a message, and bytes that are not UTF-8, which no JSON file can hold.
UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")

SPLITS = ("train", "test", "val", "valid", "validation", "dev", "held_out")


class FolderEntry(NamedTuple):
    """An image of a listing."""

    file: str
    captions: tuple[str, ...]
    annotations: Annotations = NOTHING


class FolderSource:
    """The images of a listing, in its order; `id` is the file's path below the folder.

    Attributes:
        folder: all of them are in it.
        classes: the names of all classes that the listing names; () where it names none.
        repeats: times that an epoch has each image; None for once.
        problems: rows that cannot be used.
    """

    def __init__(self, folder: DataFolder, listing: Listing, rules: RowRules):
        """Reads and checks the listing; the images are opened when they are asked for.

        Raises:
            UserError: classes are named that cannot be read.
        """
        self.folder, self._files, self._listing, self._needs = folder.path, folder, listing, rules.needs
        rows, classes = array("q"), set()
        self.problems: list[Problem] = []
        for row in range(len(listing)):
            place = listing.place(row)
            try:
                entry = self._entry(row, place)
                for file in (entry.file, *entry.annotations.files()):
                    folder.file(file, place)
            except UserError as error:
                self.problems.append(Problem(place, str(error), len(rows)))
                continue
            classes.update(entry.annotations.classes())
            rows.append(row)
        self._rows = np.array(rows) if self.problems else range(len(listing))
        self.classes = names(classes, str(folder.path))
        self._places = {name: i for i, name in enumerate(self.classes)}
        repeats = getattr(listing, "repeats", None)
        self.repeats = None if repeats is None else repeats[np.array(rows, np.int64)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        entry, place = self._entry_of(index), self._short(index)
        file, annotations = self._file(entry.file, index), entry.annotations
        image = read_image(file, place)
        example: dict[str, Any] = {"image": image, "id": entry.file, **captioned(entry.captions)}
        if annotations.label_map is not None:
            example["label_map"] = read_labels(self._file(annotations.label_map, index), image.shape[:2], place)
        if annotations.neighbours is not None:
            example["neighbours"] = read_embeddings(self._file(annotations.neighbours, index), place)
        if annotations.conditioning_image is not None and CONDITIONING_IMAGE in self._needs:
            hint = self._file(annotations.conditioning_image, index)
            example[CONDITIONING_IMAGE] = read_conditioning_image(hint, image.shape[:2], place)
        return {**example, **arrays(annotations, self._places, image.shape[:2])}  # type: ignore[typeddict-item]

    def id(self, index: int) -> str:
        """The image's file, as the listing has it."""
        return self._entry_of(index).file

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return image_size(self._file(self.id(index), index), self._short(index))

    def place(self, index: int) -> str:
        """The row of the listing."""
        return self._listing.place(int(self._rows[index]))

    def _file(self, name: str, index: int) -> str:
        # Anew each time: a link may be another one than when the folder was opened.
        return self._files.file(name, self.place(index))

    def _short(self, index: int) -> str:
        place = self.place(index).removeprefix(f"{self.folder}/")
        return "" if place == self.id(index) else place

    def _entry_of(self, index: int) -> FolderEntry:
        return self._entry(int(self._rows[index]), self.place(index))

    def _entry(self, row: int, place: str) -> FolderEntry:
        entry = self._listing[row]
        file = entry.get(FILE_NAME)
        if file is None:
            raise UserError(f"{place} has no {FILE_NAME}; its keys are {keys_of(entry)}")
        if not isinstance(file, str) or not file or UNFIT.search(file):
            raise UserError(f"{place}: {FILE_NAME} is {file!r}, and should be the name of a file, in UTF-8")
        captions = captions_of(entry, place) if CAPTION in self._needs else ()
        found = FolderEntry(file, captions, parse_annotations(entry, place))
        for name in self._needs:
            if not captions if name == CAPTION else getattr(found.annotations, name) is None:
                raise UserError(f"{place} {self._listing.lacks(entry, name)}")
        return found


def listed_images(path: Path, split: str, rules: RowRules) -> FolderSource:
    """The images of a folder, in the order of its list, or with captions in files beside them where it has none.

    Raises:
        UserError: there is no such folder, split or image.
    """
    parent, chosen = DataFolder(path, rules.links), split_folder(path, split)
    parent.check(os.path.realpath(chosen), f"the split {split}", chosen.name)
    folder = DataFolder(chosen, rules.links)
    found = find_listing(chosen)
    if found is None:
        return _all_images(folder, rules, concepts=True)
    folder.file(found.name, str(chosen))
    listing = LISTINGS[found.name](found)
    if not len(listing):
        raise UserError(f"{found} lists no images")
    return FolderSource(folder, listing, rules)


def plain_images(path: Path, rules: RowRules = ANY, without: Collection[str] = ()) -> FolderSource:
    """All images of a folder and of those below it, but those named `without`; captions are not read.

    Raises:
        UserError: there is no such folder, no image in it, or captions are needed.
    """
    if CAPTION in rules.needs:
        raise UserError(
            f"pictures:{path} has no captions, and this run needs them; folder:{path} reads {', '.join(LISTINGS)}, or "
            f"files {' and '.join(SIDECARS)} beside the images"
        )
    return _all_images(DataFolder(path, rules.links), rules, without=without)


def _all_images(
    folder: DataFolder, rules: RowRules, without: Collection[str] = (), concepts: bool = False
) -> FolderSource:
    listing = ImageFiles(folder, rules.needs, concepts, without)
    if not len(listing):
        lists = f" and no list of them ({', '.join(LISTINGS)})" if concepts else ""
        raise UserError(f"{folder.path} holds no images ({', '.join(SUFFIXES)}){lists}")
    return FolderSource(folder, listing, rules)


def split_folder(folder: Path, split: str) -> Path:
    """FOLDER/split if it has a list, or if FOLDER has none and its folders are splits; else FOLDER, the split `train`.

    Among bus/, car/ and train/, the last is a class.

    Raises:
        UserError: another split, which does not exist.
    """
    own = folder / split
    if find_listing(own):
        return own
    if own.is_dir() and not find_listing(folder):
        others = {entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)}
        if others <= {*SPLITS, split}:
            return own
    if split != "train":
        raise UserError(f"no split {split!r} in {folder}: {own} does not exist, or has no list ({', '.join(LISTINGS)})")
    return folder
