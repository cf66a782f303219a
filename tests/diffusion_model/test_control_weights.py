"""Factors of residuals against the published numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.diffusion_model.conditioner import Host
from sdjax.diffusion_model.conditioners.control import WEIGHTS, ControlConditioner, acting
from sdjax.models.controlnet import VARIANTS

HINT = np.zeros((64, 64, 3), np.float32)
# torch.logspace(-1, 0, n), the factors of diffusers' guess mode.
GUESS = {
    "sd1": ".1 .121153 .14678 .177828 .215443 .261016 .316228 .383119 .464159 .562341 .681292 .825404 1",
    "sdxl": ".1 .129155 .16681 .215443 .278256 .359381 .464159 .599484 .774264 1",
}


def weights(*nets: str, calls: int = 1, latents: tuple[int, int] = (64, 64), **inputs: Any) -> np.ndarray:
    host = Host("x", {}, {}, (64, 64), latents, rows=calls + 2, calls=calls)
    made = ControlConditioner(tuple(VARIANTS[net] for net in nets))
    return made.encode({"control_image": [HINT] * len(nets), **inputs}, host)[WEIGHTS]


@pytest.mark.parametrize(
    ("calls", "start", "end", "kept"),
    [
        (5, 0.2, 0.6, [0, 1, 1, 0, 0]),
        (10, 0.0, 0.5, [1] * 5 + [0] * 5),
        (20, 0.3, 0.8, [0] * 6 + [1] * 10 + [0] * 4),
        (3, 0.0, 1.0, [1, 1, 1]),
    ],
)
def test_calls_between_start_and_end_are_diffusers(calls, start, end, kept):
    """huggingface/diffusers, pipeline_controlnet.py, `controlnet_keep`."""
    np.testing.assert_array_equal(acting(calls, start, end), kept)
    made = weights("sd1", calls=calls, control_start=start, control_end=end)
    np.testing.assert_array_equal(made[:, 0, 0, 0], [*kept, 0, 0])  # nothing in rows that call no network


@pytest.mark.parametrize("name", GUESS)
def test_modes_are_the_published_ones(name):
    """Of lllyasviel/ControlNet, Mikubill/sd-webui-controlnet, diffusers, and the paper: w = 64 / h."""
    guess = [float(number) for number in GUESS[name].split()]
    soft = 0.825 ** (12.0 - np.arange(len(guess)))
    levels = np.array(VARIANTS[name].residuals)
    for mode, null, expected in (
        ("balanced", 1.0, np.ones(len(soft))),
        ("prompt", 1.0, soft),
        ("control", 0.0, soft),
        ("guess", 0.0, guess),
        ("resolution", 0.0, 2.0**levels),
    ):
        made = weights(name, control_mode=mode, control_scale=0.5)[0, 0]
        np.testing.assert_allclose(made[:, 0], 0.5 * np.array(expected), rtol=1e-5)
        np.testing.assert_allclose(made[:, 1], null * made[:, 0])
    # SD 1's middle at 512 pixels is 8 latents high, as the paper counts; and half as much at 1024.
    assert weights("sd1", control_mode="resolution")[0, 0, -1, 0] == 8.0
    assert weights("sd1", control_mode="resolution", latents=(128, 128))[0, 0, -1, 0] == 4.0


def test_each_network_has_its_own():
    made = weights("sd1", "sd1", calls=4, control_scale=[0.5, 2.0], control_end=[0.5, 1.0])
    np.testing.assert_array_equal(made[:4, :, 3, 0], [[0.5, 2], [0.5, 2], [0, 2], [0, 2]])
    np.testing.assert_array_equal(weights("sd1", "sd1", control_scale=0.5)[0, :, 0, 0], [0.5, 0.5])


@pytest.mark.parametrize(
    ("nets", "inputs", "said"),
    [
        (1, {"control_start": 0.5, "control_end": 0.5}, "control_start 0.5 and control_end 0.5"),
        (2, {"control_start": [0.5, -1.0]}, "control_start -1"),
        (2, {"control_scale": [0.5, 1.0, 1.0]}, "3 entries in control_scale for 2 in controlnet"),
        (2, {"control_image": HINT}, "1 entries in control_image for 2 in controlnet"),
        (1, {"control_scale": [[0.5, 1.0]]}, "control_scale [0.5, 1.0]"),
        (1, {"control_from": "canny,none"}, "2 entries in control_from"),
        (1, {"control_image": None}, "x needs control_image"),
        (1, {"control_image": np.zeros((64, 64, 4), np.float32)}, "control_image has the shape [64, 64, 4]"),
    ],
)
def test_rejects_with_one_line(nets, inputs, said):
    with pytest.raises(UserError) as error:
        weights(*["sd1"] * nets, **inputs)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
