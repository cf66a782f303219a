import json

import numpy as np
import pytest
from PIL import Image

from configs import controlnet
from sdjax.data.hints.canny import canny
from sdjax.eval import edges
from sdjax.eval.edges import edge_agreement

HINT = np.zeros((32, 32, 3), np.float32)
HINT[10, 4:28] = 1.0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({10: 1.0}, (1.0, 1.0, 1.0)),
        ({12: 1.0}, (1.0, 1.0, 1.0)),  # two pixels off
        ({13: 1.0}, (0.0, 0.0, 0.0)),
        ({10: 1.0, 25: 1.0}, (1.0, 0.5, 2 / 3)),
        ({10: 0.5}, (0.0, 1.0, 0.0)),  # not dark
    ],
)
def test_dark_lines_near_those_of_the_hint_count(rows, expected):
    image = np.ones_like(HINT)
    for row, ink in rows.items():
        image[row, 4:28] -= ink
    assert edge_agreement(image, HINT) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("maker", ["", "canny"])
def test_a_folder_is_read_as_in_training(maker, monkeypatch, tmp_path):
    """Hints of unlike sizes, its own or made of its images: drawings of them alone agree, and blank paper does not."""
    lines, folder = [], tmp_path / "data" / "held_out"
    folder.mkdir(parents=True)
    for i, side in enumerate((96, 128, 160)):
        image = np.full((side, side + 8 * i, 3), 255, np.uint8)
        image[side // 4 : side // 2, side // 4 : side // 2] = 0
        Image.fromarray(image).save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "text": f"square {i}"}
        if not maker:
            Image.fromarray(canny(image)).convert("RGB").save(folder / f"hint{i}.png")
            row["conditioning_image"] = f"hint{i}.png"
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    calls, bases = [], []

    def pipe(texts, control_image, control_scale, **how):
        calls.append(texts)
        return [1.0 - control_scale * hint / np.float32(255.0) for (hint,) in control_image]

    monkeypatch.setattr(edges.sdjax, "load", lambda base, controlnet: bases.append(base) or pipe)
    config = controlnet.get_config("openmoji").unlock()
    config.data.update(source=f"folder:{tmp_path}/data", control_from=maker)
    figures = edges.evaluate_control(config, "checkpoints/openmoji_lineart")
    drawings = figures.pop("f1_drawings")
    assert figures == {
        "drawings": 3,
        "f1_empty": 1.0,
        "f1_empty_uncontrolled": 0.0,
        "f1_another": 1.0,
        "f1_another_uncontrolled": 0.0,
    }
    assert 0.0 < drawings < 1.0, "their insides are dark, too"
    assert calls[2] == ["square 1", "square 2", "square 0"]
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "model_index.json").touch()
    edges.evaluate_control(config, str(tmp_path / "run"))
    assert bases == ["checkpoints/openmoji", str(tmp_path / "run")], "a base that learned, too, is its own"
