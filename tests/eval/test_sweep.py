"""Guidance sweeps: captions, figures and the plot; and a CLIP's own figures on numbers known by hand."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import zoo
from PIL import Image

import sdjax
from sdjax.core.errors import UserError
from sdjax.data.images import read_image, to_uint8
from sdjax.data.sources.open import source
from sdjax.eval import __main__ as command
from sdjax.eval.caption_retrieval import matched_above_shuffled
from sdjax.eval.plot import PlotAxis, write_plot
from sdjax.eval.sweep import drawn_captions, flat, parse_scales, plot

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Six images, each of two captions."""
    folder, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [f"cat {i}", f"heart {i}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_captions_are_drawn_one_an_image(captioned):
    images = source(f"folder:{captioned}")
    drawn = [drawn_captions(images, limit, seed) for limit, seed in ((None, 0), (4, 0), (None, 1))]
    assert sorted(int(caption.split()[1]) for caption in drawn[0]) == list(range(6))
    assert {caption.split()[0] for caption in drawn[0] + drawn[2]} == {"cat", "heart"}
    assert drawn[1] == drawn[0][:4]
    assert drawn[2] != drawn[0]


def test_a_sweep_samples_scores_and_plots(captioned, model_folder, clip_folder, tmp_path, monkeypatch, capsys):
    """What lacks its network is said once; the images of a scale are those of a call with it."""
    monkeypatch.setenv("SDJAX_WEIGHTS", str(tmp_path))
    flags = ["--sweep=1,7.5", f"--model={model_folder}", f"--real=folder:{captioned}", f"--clip={clip_folder}"]
    flags += [f"--folder={tmp_path}/out", f"--steps={zoo.STEPS}", f"--batch_size={zoo.BATCH}", "--limit=2"]
    monkeypatch.setattr(sys, "argv", ["eval", *flags, f"--output={tmp_path}/figures.json"])
    command.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["clip_score_at_1", "clip_score_at_7.5"]
    assert capsys.readouterr().err.count("fid is left out") == 1
    captions = drawn_captions(source(f"folder:{captioned}"), 2, 0)
    how = {"seed": 0, "steps": zoo.STEPS, "batch_size": zoo.BATCH, "guidance_scale": 7.5, "syntax": "plain"}
    images = [read_image(tmp_path / "out" / "guidance_7.5" / f"{i:05d}.png") for i in range(2)]
    np.testing.assert_array_equal(images, to_uint8(sdjax.load(model_folder)(captions, **how)))
    texts = [text.text for text in ElementTree.parse(tmp_path / "out" / "sweep.svg").iter(f"{SVG}text")]
    assert {"guidance scale", "CLIP score", "1", "7.5"} <= set(texts)


def test_the_lowest_fid_has_its_scale(tmp_path):
    found = {
        1.0: {"fid": 9.0, "clip_score": 20.0},
        1.5: {"fid": 7.0, "clip_score": 24.0},
        4.0: {"fid": 8.0, "clip_score": 30.0},
    }
    figures = flat(found)
    assert figures["fid"] == 7.0
    assert figures["fid_guidance_scale"] == 1.5
    assert figures["clip_score_at_4"] == 30.0
    plot(tmp_path / "sweep.svg", found)
    texts = [text.text for text in ElementTree.parse(tmp_path / "sweep.svg").iter(f"{SVG}text")]
    assert {"FID", "CLIP score; labels are guidance scales", "1", "1.5", "4"} <= set(texts)


def test_points_of_a_plot_stand_where_their_values_are(tmp_path):
    """Larger is to the right and above; a tick's value and its place agree with a point's."""
    write_plot(
        tmp_path / "plot.svg", PlotAxis("x < y", [0.0, 1.0, 4.0]), PlotAxis("y", [5.0, 5.0, 6.0]), ["a", "b", "c"]
    )
    root = ElementTree.parse(tmp_path / "plot.svg")
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    (ax, ay), (bx, by), (cx, cy) = points
    assert (cx - ax) == pytest.approx(4 * (bx - ax), abs=0.5)
    assert ay == by
    assert cy < ay
    ticks = {text.text: float(text.get("x")) for text in root.iter(f"{SVG}text")}
    assert ticks["2"] == pytest.approx(ax + 0.5 * (cx - ax), abs=0.5)
    assert "x < y" in ticks
    assert np.isfinite(PlotAxis("x", [3.0]).ticks()).all()


@pytest.mark.parametrize("text", ["1,two", "1,-2", "1,1", "nan", ""])
def test_bad_scales_are_one_line(text):
    with pytest.raises(UserError, match=r"^--sweep '.*guidance scales"):
        parse_scales(text)


def test_matched_captions_above_shuffled_ones():
    """Two others each: 2, 1 and 0 of them are below."""
    image = np.eye(3)
    text = np.array([[0.9, 0.5, 0.9], [0.1, 0.4, 0.8], [0.2, 0.1, 0.1]])
    assert matched_above_shuffled(image, text) == pytest.approx((2 + 1 + 0) / 6)
