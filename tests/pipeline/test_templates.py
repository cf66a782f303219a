"""Templates of prompts: each image's own words, by its seed and index, and on record."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdjax.cli.jobs import expand_jobs, prepare_jobs
from sdjax.cli.prompt_files import parse_line
from sdjax.cli.records import write_image
from sdjax.cli.settings.read import read_settings
from sdjax.core.errors import UserError
from sdjax.pipeline.templates import inputs_of_images

TEMPLATE, NEGATIVE = "a {red|blue|green|white} heart", "{cat|dog|hat}"


@pytest.fixture
def wildcards(tmp_path):
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "animal.txt").write_text("# two of them\ncat\ndog\n")
    return tmp_path


def words(rows):
    return [(row.settings["prompt"], row.settings["negative_prompt"]) for row in rows]


def test_each_image_has_its_own_words(ours):
    """The same ones whichever call makes it; they and the template are on record."""
    rows = ours.prepare([TEMPLATE, "flag"], NEGATIVE, num_images=8, seed=3)
    assert len(set(words(rows[:8]))) > 3
    assert words(rows) == words(ours.prepare([TEMPLATE, "flag"], NEGATIVE, num_images=8, seed=3))
    assert words(rows[5:6]) == words(ours.prepare(TEMPLATE, NEGATIVE, first_index=5, seed=3))
    assert words(rows) != words(ours.prepare([TEMPLATE, "flag"], NEGATIVE, num_images=8, seed=4))
    assert [prompt for prompt, _ in words(rows)] == [
        row.settings["prompt"] for row in ours.prepare([TEMPLATE, "flag"], "none", num_images=8, seed=3)
    ], "the negative prompt draws for itself"
    templates = [row.settings.get("prompt_template") for row in rows]
    assert templates == [TEMPLATE] * 8 + [None] * 8
    assert {row.settings["negative_prompt_template"] for row in rows} == {NEGATIVE}
    plain = ours.prepare(*words(rows)[2], first_index=2, seed=3)[0]
    for name, column in plain.parts[0].columns.items():
        np.testing.assert_array_equal(rows[2].parts[0].columns[name], column)
    assert "prompt_template" not in plain.settings


def test_cells_of_a_grid_share_their_words(ours):
    line = parse_line(f"{TEMPLATE} --num_images 3 --seed 7", "")
    jobs = expand_jobs([line], {}, [{"steps": 3}, {"steps": 4}], 0)
    rows = prepare_jobs(ours, jobs)
    assert words(rows[:3]) == words(rows[3:])
    assert len(set(words(rows))) > 1


def test_words_of_files(ours, wildcards):
    rows = ours.prepare("a [__things/animal__:{flag|hat}:2]", num_images=24, wildcard_dir=wildcards)
    assert {prompt for prompt, _ in words(rows)} == {f"a [{a}:{b}:2]" for a in ("cat", "dog") for b in ("flag", "hat")}
    assert all(row.parts[0].schedule is not None for row in rows)
    line = parse_line(f"__things/*__ --wildcard_dir {wildcards}", "")
    (row,) = prepare_jobs(ours, expand_jobs([line], {}, [{}], 0))
    assert row.settings["prompt"] in ("cat", "dog")


def test_an_image_can_be_made_again(ours, wildcards, tmp_path):
    """From its resolved prompt, without the folder."""
    (row,) = ours.prepare(r"\{a|b\} __things/animal__ {red|blue}", seed=5, wildcard_dir=wildcards)
    write_image(tmp_path / "x.png", np.asarray(Image.new("RGB", (8, 8))), {**row.settings, "index": 0})
    record = read_settings(tmp_path / "x.png").values
    assert record["prompt_template"] == r"\{a|b\} __things/animal__ {red|blue}"
    assert "wildcard_dir" not in record
    (again,) = ours.prepare(record["prompt"], seed=5)
    assert again.settings["prompt"] == row.settings["prompt"]
    np.testing.assert_array_equal(again.parts[0].columns["ids"], row.parts[0].columns["ids"])


def test_wildcards_without_a_folder_are_reported(ours, caplog):
    with caplog.at_level(logging.WARNING, "sdjax"):
        (row,) = ours.prepare("a __color__ heart")
    assert row.settings["prompt"] == "a __color__ heart"
    (record,) = caplog.records
    assert record.message == "__color__ in the prompt 'a __color__ heart' is read as words: no wildcard_dir is given"


def test_plain_prompts_and_other_models_read_no_templates(ours):
    (row,) = ours.prepare(TEMPLATE, syntax="plain")
    assert row.settings["prompt"] == TEMPLATE
    bert: Any = SimpleNamespace(inputs=("prompt", "negative_prompt"))
    entry = {"syntax": "a1111", "prompt": TEMPLATE, "negative_prompt": None}
    assert inputs_of_images(bert, [entry], {"seed": 0}, 0) == [entry]


def test_mistakes_are_named(ours, wildcards):
    for given, message in [
        ({"wildcard_dir": wildcards}, r"unknown wildcard 'color' in .*; choose one of: things/animal"),
        ({"wildcard_dir": wildcards / "none"}, "wildcard_dir .*none' is no folder"),
        ({"wildcard_dir": wildcards, "syntax": "plain"}, 'wildcard_dir changes nothing without syntax="a1111"'),
    ]:
        with pytest.raises(UserError, match=message):
            ours.prepare("a __color__ heart", **given)
