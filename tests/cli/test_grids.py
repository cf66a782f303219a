"""Grids: what they ask for, in which order, where a mistake is, and where images lie on the sheet."""

from __future__ import annotations

import numpy as np
import pytest

from sdjax.cli.grids import MAX_PIXELS, Axis, cells, contact_sheet, parse_grid
from sdjax.core.errors import UserError


def test_names_values_and_types():
    assert parse_grid("steps=10,20;sampler=euler,dpmpp_2m") == (
        Axis("steps", (10, 20)),
        Axis("sampler", ("euler", "dpmpp_2m")),
    )
    (axis,) = parse_grid(" guidance_scale = 2, 7.5,1e1 ")
    assert axis == Axis("guidance_scale", (2.0, 7.5, 10.0))
    assert {type(value) for value in axis.values} == {float}
    assert {type(value) for value in parse_grid("steps=1,2-4")[0].values} == {int}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=0-3", (0, 1, 2, 3)),
        ("steps=10-30:10", (10, 20, 30)),
        ("steps=10-29:10,50", (10, 20, 50)),
        ("seed=5-5", (5,)),
        ("strength=0.1-0.7:0.2", (0.1, 0.3, 0.5, 0.7)),
        ("guidance_scale=1-3", (1.0, 2.0, 3.0)),
    ],
)
def test_ranges(text, values):
    assert parse_grid(text)[0].values == values


def test_reading_order():
    found = cells(parse_grid("seed=1,2;steps=3,4;eta=0,1"))
    assert found[:3] == [
        {"seed": 1, "steps": 3, "eta": 0.0},
        {"seed": 1, "steps": 3, "eta": 1.0},
        {"seed": 1, "steps": 4, "eta": 0.0},
    ]
    assert len(found) == 8
    assert found[-1] == {"seed": 2, "steps": 4, "eta": 1.0}


BAD = {
    "stepz=1": r"unknown setting 'stepz' in --grid at character 1; choose one of: .*sampler.*steps",
    "steps=10; stepz=1": "unknown setting 'stepz' in --grid at character 11",
    "steps=10, 2x": "steps '2x' in --grid at character 11: choose an integer of at least 1",
    "steps=0": "steps 0 in --grid at character 7: choose an integer of at least 1",
    "eta=2": "eta 2.0 in --grid at character 5: choose a number of 0 to 1",
    "steps=1;sampler=euler,nope": "unknown sampler 'nope' in --grid at character 23; choose one of: .*euler_a",
    "schedule=euler": "unknown schedule 'euler' in --grid at character 10; choose one of: .*karras",
    "steps=": "steps '' in --grid at character 7",
    "steps=1,,2": "steps '' in --grid at character 9",
    "steps": "'steps' in --grid at character 1 is not name=value,value; choose a name of: .*steps",
    "": "'' in --grid at character 1 is not name=value",
    "steps=1;": "'' in --grid at character 9 is not name=value",
    "steps=1;steps=2": "'steps' in --grid at character 9 is there already",
    "steps=1;seed=1;eta=1;width=8": "'width' in --grid at character 22 is one too many.*at most 3",
    "steps=30-10": "steps '30-10' in --grid at character 7: choose a range first-last:step that grows",
    "steps=1-3:0": "steps '1-3:0' in --grid at character 7: choose a range",
    "steps=1-3:x": "steps '1-3:x' in --grid at character 7: choose an integer",
    "seed=0-99999999999999999999": "seed 9+ in --grid at character 6: choose an integer of -1 to 18446744073709551615",
    "seed=0-4294967295": "seed '0-4294967295' in --grid at character 6 asks for more than 1000 images",
    "seed=0-99;steps=1-99": "asks for more than 1000 images of each prompt",
    "guidance_scale=nan": "guidance_scale nan in --grid at character 16",
    "guidance_scale=1..2-3": r"guidance_scale '1\.\.2' in --grid at character 16",
}


@pytest.mark.parametrize("text", BAD)
def test_mistakes_are_one_line_with_choices(text):
    with pytest.raises(UserError, match=BAD[text]) as error:
        parse_grid(text)
    assert "\n" not in str(error.value)


def solid(count: int, height: int = 40, width: int = 60) -> list[np.ndarray]:
    """Images of one colour each, none of it a grey."""
    return [np.full((height, width, 3), (i + 1, 128, 255 - i), np.uint8) for i in range(count)]


@pytest.mark.parametrize("text", ["seed=0-3", "seed=0-2;steps=1,2", "seed=0,1;sampler=euler,dpmpp_2m_sde;eta=0,0.5,1"])
def test_every_picture_is_whole_and_in_its_place(text):
    axes = parse_grid(text)
    images = solid(len(cells(axes)))
    sheet = contact_sheet(images, axes).astype(int)
    columns = len(axes[-1].values)
    corners = []
    for image in images:
        where = np.argwhere((sheet == image[0, 0]).all(-1))
        assert len(where) == 40 * 60
        assert (where.max(0) - where.min(0)).tolist() == [39, 59]
        corners.append(where.min(0).tolist())
    tops, lefts = ([corner[side] for corner in corners] for side in (0, 1))
    assert all(len(set(tops[row : row + columns])) == 1 for row in range(0, len(images), columns))
    assert all(len(set(lefts[column::columns])) == 1 for column in range(columns))
    assert sorted(zip(tops, lefts, strict=True)) == list(zip(tops, lefts, strict=True))
    # Every label is there: ink above each column, and at the left of each row unless there is but one axis.
    ink = (sheet < 100).all(-1)
    for left in lefts[:columns]:
        assert ink[: tops[0], left : left + 60].any()
    for top in sorted(set(tops)):
        assert ink[top : top + 40, : lefts[0]].any() == (len(axes) > 1)
    assert not ink[tops[0] :, lefts[0] :].any()


def test_labels_are_not_cut():
    """A long label on small images ends in white."""
    axes = parse_grid("guidance_rescale=0.123456789,0.2;schedule=sgm_uniform,kl_optimal")
    sheet = contact_sheet(solid(4, 8, 8), axes)
    assert (sheet[:, -1] == 255).all()
    # The same label next to a much larger image has as much ink.
    small, large = ((sheet[:20] < 100).all(-1).sum() for sheet in (sheet, contact_sheet(solid(4, 190, 190), axes)))
    assert small == large > 0


def test_sizes_may_differ_and_large_ones_are_reduced():
    axes = parse_grid("width=16,32")
    sheet = contact_sheet([solid(2, 16, 16)[0], solid(2, 16, 32)[1]], axes)
    assert [(sheet == image[0, 0]).all(-1).sum() for image in solid(2)] == [16 * 16, 16 * 32]
    many = parse_grid("seed=0-24")
    sheet = contact_sheet([np.zeros((1536, 1536, 3), np.uint8)] * 25, many)
    assert sheet.shape[0] * sheet.shape[1] < 1.2 * MAX_PIXELS
