import numpy as np
import pytest

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
