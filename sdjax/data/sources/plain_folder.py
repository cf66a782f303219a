"""A folder of images and nothing else: no captions, found by their suffixes, in order of their names.

Where the images lie in folders of their own, those folders are their classes (torchvision's ImageFolder)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.images import image_size, read_image
from sdjax.data.sources.base import Example

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class PlainFolder:
    """All images of a folder and of those below it, with empty captions; `id` is the path below the folder.

    Attributes:
        folder: all of them are in it.
        classes: the folders in the folder; () where an image lies beside them.
    """

    def __init__(self, folder: Path, without: Collection[str] = ()):
        """Lists the files, but those named `without`; they are opened when they are asked for.

        Raises:
            UserError: there is no such folder, or no image in it.
        """
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        self.folder = folder
        self._files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file() and path.name not in without
        )
        if not self._files:
            raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        tops = {path.relative_to(folder).parts[0] for path in self._files}
        nested = all(len(path.relative_to(folder).parts) > 1 for path in self._files)
        self.classes = tuple(sorted(tops)) if nested else ()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"image": read_image(self._files[index]), "caption": "", "id": self.id(index)}
        if self.classes:
            example["label"] = np.int32(self.classes.index(Path(example["id"]).parts[0]))
        return example

    def id(self, index: int) -> str:
        """The image's path below the folder."""
        return str(self._files[index].relative_to(self.folder))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return image_size(self._files[index])
