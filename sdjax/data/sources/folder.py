"""A folder of images with `metadata.jsonl`, Hugging Face's imagefolder (datasets documentation, "image_dataset")."""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.image_inputs import read_embeddings
from sdjax.data.images import image_size, read_image, read_labels
from sdjax.data.sources.annotations import NOTHING, Annotations, arrays, names, parse_annotations
from sdjax.data.sources.base import CAPTION_KEYS, DatasetRow, Example, caption_of, read_json

METADATA = "metadata.jsonl"


class Line(NamedTuple):
    """A line that is not blank: its number from 1, where it begins in bytes, and what it says."""

    number: int
    start: int
    text: bytes


class FolderEntry(NamedTuple):
    """An image in the list."""

    file: str
    caption: str
    annotations: Annotations = NOTHING


class FolderSource:
    """The images that a folder's `metadata.jsonl` lists, in its order; `id` is the file's name there.

    Of a row only its line's number and place are kept, 16 bytes.

    Attributes:
        classes: the names of all classes that the list names; () where it names none.
    """

    def __init__(self, folder: Path, split: str = "train"):
        """Reads and checks the list; the images are opened when they are asked for.

        Raises:
            UserError: no list, a line that is not JSON or lacks a key, a missing file, or one outside the folder.
        """
        self._folder = split_folder(folder, split)
        check, numbers, starts = checker(self._folder), array("q"), array("q")
        classes: set[str | int] = set()
        for line in lines(self._folder / METADATA):
            classes.update(check(line).annotations.classes())
            numbers.append(line.number)
            starts.append(line.start)
        if not numbers:
            raise UserError(f"{self._folder / METADATA} lists no images")
        self._numbers, self._starts = np.array(numbers), np.array(starts)
        self.classes = names(classes, str(self._folder / METADATA))
        self._places = {name: i for i, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        line, entry = self._entry(index)
        example = read_entry(self._folder, line, entry)
        example.update(arrays(entry.annotations, self._places, example["image"].shape[:2]))  # type: ignore[typeddict-item]
        return example

    def id(self, index: int) -> str:
        """The image's file name, as the list has it."""
        return self._entry(index)[1].file

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        line, entry = self._entry(index)
        return image_size(self._folder / entry.file, _short(line))

    def _entry(self, index: int) -> tuple[Line, FolderEntry]:
        number, start = int(self._numbers[index]), int(self._starts[index])
        with _opened(self._folder / METADATA) as file:
            file.seek(start)
            line = Line(number, start, file.readline())
        return line, parse(line, _place(self._folder, line))


def rows(folder: Path, split: str = "train") -> Iterator[DatasetRow]:
    """Every row of the list, good or bad."""
    folder = split_folder(folder, split)
    check = checker(folder)

    def read(line: Line) -> Example:
        return read_entry(folder, line, check(line))

    for line in lines(folder / METADATA):
        yield DatasetRow(_place(folder, line), functools.partial(read, line))


def split_folder(folder: Path, split: str) -> Path:
    """FOLDER/split if it has a list, else FOLDER, which holds the split `train`.

    Raises:
        UserError: another split, which has no list.
    """
    if (folder / split / METADATA).is_file():
        return folder / split
    if split != "train":
        raise UserError(f"no split {split!r} in {folder}: {folder / split / METADATA} does not exist")
    return folder


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank.

    Raises:
        UserError: the file cannot be read.
    """
    start = 0
    with _opened(path) as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield Line(number, start, text)
            start += len(text)


def parse(line: Line, place: str) -> FolderEntry:
    """Contents of a line.

    Raises:
        UserError: it is not JSON, or lacks a key.
    """
    entry = read_json(line.text, place)
    file, caption = entry.get("file_name"), caption_of(entry)
    if not isinstance(file, str) or "\0" in file or caption is None:
        raise UserError(f"{place} needs the strings file_name and {' or '.join(CAPTION_KEYS)}")
    return FolderEntry(file, caption, parse_annotations(entry, place))


def checker(folder: Path) -> Callable[[Line], FolderEntry]:
    """`parse`, then whether the files exist, and within the folder, symbolic links followed."""
    root = os.path.realpath(folder)
    # A link to a folder is followed once, not for every image in it.
    real = functools.lru_cache(maxsize=1024)(os.path.realpath)

    def check_file(place: str, file: str) -> None:
        path = os.path.join(folder, file)
        target = os.path.join(real(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(target) or os.path.basename(path) in ("", ".", ".."):
            target = os.path.realpath(target)
        if os.path.commonpath([root, target]) != root:
            raise UserError(f"{place} names {file!r}, which is outside the folder")
        if not os.path.isfile(target):
            raise UserError(f"{place} names {path}, which does not exist")

    def check(line: Line) -> FolderEntry:
        place = _place(folder, line)
        entry = parse(line, place)
        for file in (entry.file, *entry.annotations.files()):
            check_file(place, file)
        return entry

    return check


def read_entry(folder: Path, line: Line, entry: FolderEntry) -> Example:
    """The example of a line."""
    image = read_image(folder / entry.file, _short(line))
    example = Example(image=image, caption=entry.caption, id=entry.file)
    if (file := entry.annotations.label_map) is not None:
        example["label_map"] = read_labels(folder / file, image.shape[:2], _short(line))
    if (file := entry.annotations.neighbours) is not None:
        example["neighbours"] = read_embeddings(folder / file, _short(line))
    return example


def _short(line: Line) -> str:
    return f"{METADATA} line {line.number}"


def _place(folder: Path, line: Line) -> str:
    return f"{folder / METADATA} line {line.number}"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
