"""DrawBench, prompts of eleven kinds of difficulty (Saharia et al. 2022, section 4.3), from the user's own copy.

The published list has no licence, so it is not here: a spreadsheet with the columns Prompts and Category.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sdjax
from sdjax.checkpoints.clip_pair import CLIPPair
from sdjax.core.errors import UserError
from sdjax.core.files import check_writable
from sdjax.core.untrusted import read_text
from sdjax.data.images import read_image, tile
from sdjax.data.transforms.images import square
from sdjax.eval.clip_score import caption_embeddings, image_embeddings, score_of
from sdjax.eval.samples import Sampling, image_file, write_image, write_samples
from sdjax.eval.side_by_side import Pair, write_page

COLUMNS = ("Prompts", "Category")
PROMPTS, CATEGORIES = 200, 11
CELL = 256  # pixels of an image on a sheet, at most
SHEETS, PAGE = "sheets", "side_by_side.html"


class Prompt(NamedTuple):
    """A row of the list."""

    text: str
    category: str


def read_prompts(path: Path, say: Callable[[str], None]) -> list[Prompt]:
    """The rows of a CSV file, in its order; blank ones are left out.

    Args:
        say: called with a line where there are not the 200 prompts in 11 categories that were published.

    Raises:
        UserError: it cannot be read, lacks a column, or a row lacks a value.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        header, rows = [name.strip() for name in reader.fieldnames or ()], list(_rows(reader))
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file: {error}") from error
    for name in COLUMNS:
        if name not in header:
            raise UserError(
                f"{path} has no column {name}; its columns are {', '.join(header) or 'none'}, and DrawBench's "
                f"{', '.join(COLUMNS)}"
            )
    prompts = [Prompt(*(row.get(name, "") for name in COLUMNS)) for _, row in rows]
    for (line, _), prompt in zip(rows, prompts, strict=True):
        if "" in prompt:
            raise UserError(f"{path}, line {line}: there is no {COLUMNS[prompt.index('')]}")
    if not prompts:
        raise UserError(f"{path} has no prompts")
    count = len({prompt.category for prompt in prompts})
    if (len(prompts), count) != (PROMPTS, CATEGORIES):
        say(f"{path} has {len(prompts)} prompts in {count} categories; DrawBench has {PROMPTS} in {CATEGORIES}")
    return prompts


def _rows(reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The last line of each row that is not blank, and its values without the space around them."""
    for row in reader:
        values = {name.strip(): value.strip() for name, value in row.items() if isinstance(value, str) and name}
        if any(values.values()):
            yield reader.line_num, values


def drawbench(
    prompts: Sequence[Prompt], models: Mapping[str, str], folder: Path, how: Sampling, clip: CLIPPair | None
) -> dict[str, Any]:
    """Sample every prompt by one or two models, and compare them.

    Writes FOLDER/NAME/NNNNN.png with their prompts, a sheet a category (a row a prompt) in FOLDER/sheets/NAME, and of
    two models FOLDER/side_by_side.html.

    Args:
        models: NAME, and what `sdjax.load` takes.
        clip: judges; None for no scores.

    Returns:
        CLIP score of each model, over all prompts and of each category.

    Raises:
        UserError: a model cannot be loaded, or as `write_samples`.
    """
    check_writable(folder)
    figures: dict[str, Any] = {}
    for name, source in models.items():
        write_samples(sdjax.load(source), [prompt.text for prompt in prompts], folder / name, how)
        write_sheets(prompts, folder, name, how.images)
        if clip is not None:
            figures |= scores(clip, prompts, folder / name, name, how)
    if len(models) == 2:
        pairs = [Pair(*prompt, sides=_files(models, i, how.images)) for i, prompt in enumerate(prompts)]
        write_page(folder / PAGE, pairs, list(models.items()), how.seed)
    return figures


def _files(models: Mapping[str, str], number: int, images: int) -> list[list[str]]:
    """Images of a prompt by each model, as the page beside their folders names them."""
    numbers = range(number * images, (number + 1) * images)
    return [[image_file(Path(name), i).as_posix() for i in numbers] for name in models]


def by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Numbers of the prompts of each category, in the order in which they come."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt.category, []).append(i)
    return found


def write_sheets(prompts: Sequence[Prompt], folder: Path, name: str, images: int) -> None:
    """Write the sheet of each category: a row a prompt."""
    target = folder / SHEETS / name
    check_writable(target)
    for category, numbers in by_category(prompts).items():
        rows = [n * images + k for n in numbers for k in range(images)]
        cells = [read_image(image_file(folder / name, row)) for row in rows]
        side = min(CELL, *cells[0].shape[:2])
        write_image(target / f"{file_name(category)}.png", tile(np.stack([square(x, side) for x in cells]), images))


def file_name(category: str) -> str:
    """A category as the name of a file: "Gary Marcus et al." is gary_marcus_et_al."""
    kept = "".join(letter if letter.isalnum() else " " for letter in category.lower())
    return "_".join(kept.split()) or "_"


def scores(clip: CLIPPair, prompts: Sequence[Prompt], folder: Path, name: str, how: Sampling) -> dict[str, float]:
    """CLIP score of a model's images, over all and by category."""
    count = len(prompts) * how.images
    image = image_embeddings(clip, _Files(folder, count), how.batch_size)
    text = caption_embeddings(clip, [prompt.text for prompt in prompts], how.batch_size).repeat(how.images, axis=0)
    figures = {f"{name}_clip_score": round(score_of(image, text), 2)}
    for category, numbers in by_category(prompts).items():
        rows = [n * how.images + k for n in numbers for k in range(how.images)]
        figures[f"{name}_clip_score_{file_name(category)}"] = round(score_of(image[rows], text[rows]), 2)
    return figures


class _Files(Sequence[dict[str, Any]]):
    """Samples of a folder by number, read when they are asked for."""

    def __init__(self, folder: Path, count: int):
        self._folder, self._count = folder, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return {"image": read_image(image_file(self._folder, index))}
