"""Bounds of requests, and what a request may not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sdjax.core.errors import UserError
from sdjax.pipeline.options import OPTIONS, check_int
from sdjax.pipeline.prepare import Row
from sdjax.serve.jobs import Call

# Options whose values are images; in a request they are these themselves, never names of files.
IMAGES = ("init_image", "mask", "depth", "label_map", "control_image", "resemble", "ip_image", "t2i_image")
# Options of the server's own files.
LOCAL = ("wildcard_dir",)
# An option of calls in Python that an API's own code may set.
OPEN = ("paste",)


class Limits(NamedTuple):
    """Bounds of one request.

    Attributes:
        max_steps: of the sampler.
        max_side: pixels of an image, its second pass included.
        max_images: of one request.
        max_upload_bytes: of its body.
        max_pixels: of each given image.
    """

    max_steps: int = 150
    max_side: int = 2048
    max_images: int = 16
    max_upload_bytes: int = 2**25
    max_pixels: int = 2**24

    def check_calls(self, calls: Sequence[Call]) -> None:
        """Hold what is known before anything is prepared to the bounds.

        Raises:
            UserError: too many images, an option of calls in Python, or a value that names a file.
        """
        images = 0
        for call in calls:
            for name, value in call.options.items():
                if name in OPTIONS and (OPTIONS[name].scope != "image" or name in LOCAL) and name not in OPEN:
                    raise UserError(f"{name} is no option of a request")
                if name in OPTIONS and OPTIONS[name].file and holds_text(value):
                    raise UserError(f"{name}: a request holds the data itself, not the name of a file")
            number = call.options.get("num_images")
            images += 1 if number is None else check_int("num_images", number, 1, self.max_images)
        if images > self.max_images:
            raise UserError(f"num_images: {images} images in a request; this server makes at most {self.max_images}")

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Hold prepared images to the bounds; a UserError names the option that is beyond."""
        for row in rows:
            self._check_row(row)

    def _check_row(self, row: Row, name: str = "") -> None:
        for option in ("steps", "hires_steps"):
            if row.settings.get(option, 0) > self.max_steps:
                raise UserError(f"{name}{option} {row.settings[option]}: this server runs at most {self.max_steps}")
        if max(row.size) > self.max_side:
            size = f"{row.size[1]}x{row.size[0]}"
            raise UserError(f"{name}width or height of {size}: this server makes at most {self.max_side}")
        if row.following is not None:
            self._check_row(row.following, "hires: " if row.second is not None else "a later stage: ")


def holds_text(value: Any) -> bool:
    """True if a value, or one in a list, is a text."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(map(holds_text, value)))
