"""Formulas of adapters that change weights, by numbers that LyCORIS' and peft's own functions gave (in torch, float32).

KohakuBlueleaf/LyCORIS lycoris/functional and lycoris/modules; huggingface/peft tuners/lora/dora.py.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sdjax.models.weight_changes import changed, differences, from_torch, to_torch

WEIGHT = np.array([[1, 2, 3], [4, 5, 6]], np.float32)  # [o, i]
DOWN, UP = [[1, 0, 2], [0, 1, 1]], [[1, 2], [3, 4]]
FACTORS = {"down": np.transpose(DOWN), "up": np.transpose(UP), "scale": 0.5}
DELTA = np.array([[0.5, 1, 2], [1.5, 2, 5]])
MAGNITUDE = 1.1 * np.linalg.norm(WEIGHT, axis=1, keepdims=True)
HADA = {
    "hada_w1_a": [[1, 2], [0, 1]],
    "hada_w1_b": [[1, 0, 1], [2, 1, 0]],
    "hada_w2_a": [[1, 1], [2, 0]],
    "hada_w2_b": [[0, 1, 2], [1, 0, 1]],
    "scale": 0.5,
}
TUCKER = {"hada_t1": np.reshape([1, 2, 3, 4], (2, 2, 1, 1)), "hada_t2": np.reshape([2, 3, 4, 5], (2, 2, 1, 1))}
LOKR = {"lokr_w1": [[1, 2], [3, 4]]}
CP = {  # of a convolution of one row and two columns of taps
    "down": np.reshape([1, 3, 2, 4], (1, 1, 2, 2)),
    "mid": np.arange(8).reshape(2, 2, 1, 2).transpose(2, 3, 1, 0),
    "up": np.transpose([[1, 0], [2, 1]]),
    "scale": 0.5,
}
KERNEL_3X3 = {
    "down": (np.arange(18) / 10).reshape(2, 1, 3, 3).transpose(2, 3, 1, 0),
    "up": [[1], [-1]],
    "scale": 0.5,
}
GOLDEN = {
    "lora": (WEIGHT, FACTORS, DELTA),
    "rslora": (WEIGHT, {**FACTORS, "scale": 2**-0.5}, DELTA * 2**0.5),
    "convolution": (np.zeros((1, 1, 3, 3)), KERNEL_3X3, np.full((1, 1, 3, 3), -0.45)),
    "cp": (np.zeros((2, 2, 1, 2)), CP, np.reshape([3, 5, 4, 7, 17, 23, 24, 33], (2, 2, 1, 2))),
    "loha": (WEIGHT, HADA, [[2.5, 1, 1.5], [0, 1, 0]]),
    "loha_tucker": (
        np.zeros((2, 3, 1, 1)),
        {**HADA, **TUCKER},
        np.reshape([32.5, 10, 16.5, 31.5, 8, 17.5], (2, 3, 1, 1)),
    ),
    "lokr": (
        np.zeros((2, 6)),
        {**LOKR, "lokr_w2": [[1, 0, -1]], "scale": 1},
        [[1, 0, -1, 2, 0, -2], [3, 0, -3, 4, 0, -4]],
    ),
    "lokr_factors": (
        np.zeros((4, 6)),
        {**LOKR, "lokr_w2_a": [[1], [2]], "lokr_w2_b": [[1, 0, 3]], "scale": 0.5},
        [[0.5, 0, 1.5, 1, 0, 3], [1, 0, 3, 2, 0, 6], [1.5, 0, 4.5, 2, 0, 6], [3, 0, 9, 4, 0, 12]],
    ),
    "ia3_out": (WEIGHT, {"ia3": [[0.1], [-0.2]]}, [[0.1, 0.2, 0.3], [-0.8, -1, -1.2]]),
    "ia3_in": (WEIGHT, {"ia3": [[0.1, 0.2, 0.3]]}, [[0.1, 0.4, 0.9], [0.4, 1, 1.8]]),
    "diff": (WEIGHT, {"diff": DELTA}, DELTA),
}
DORA = {
    ("row", 1.0): [[1.025401, 2.050803, 3.418005], [3.751582, 4.774742, 7.503165]],
    ("column", 1.0): [[1.193347, 2.333452, 3.053462], [4.375605, 5.444722, 6.717616]],
    ("peft", 1.0): [[1.025401, 2.050803, 3.418005], [3.751582, 4.774742, 7.503165]],
    ("peft", 0.5): [[1.0543, 2.1086, 3.37376], [4.008732, 5.063662, 7.173521]],  # W' of half the difference
    ("row", 0.5): [[1.012701, 2.025402, 3.209002], [3.875791, 4.887371, 6.751582]],  # half of W' - W (A1111, ComfyUI)
    ("row", 0.0): WEIGHT,
    ("peft", 0.0): WEIGHT,
}


def kernel(weight) -> np.ndarray:
    return np.asarray(from_torch(np.asarray(weight, np.float32)))


def entry(values) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


difference, change = jax.jit(differences), jax.jit(changed)


@pytest.mark.parametrize("kind", GOLDEN)
def test_differences(kind):
    weight, factors, expected = GOLDEN[kind]
    found = difference({"kernel": kernel(weight)}, entry(factors), 1.0)
    np.testing.assert_allclose(to_torch(found["kernel"]), expected, rtol=2e-6)
    half = difference({"kernel": kernel(weight)}, entry(factors), 0.5)
    np.testing.assert_allclose(half["kernel"], found["kernel"] / 2, rtol=1e-6)


@pytest.mark.parametrize(("rule", "strength"), DORA)
def test_dora(rule, strength):
    """Rows by peft's rule and by that of user interfaces, and columns (LyCORIS before `wd_on_out`), by shape."""
    columns = 1.1 * np.linalg.norm(WEIGHT, axis=0, keepdims=True)
    own = {"row": {"dora_scale": MAGNITUDE}, "column": {"dora_scale": columns}, "peft": {"magnitude": MAGNITUDE[:, 0]}}
    made = change({"kernel": kernel(WEIGHT)}, [entry({**FACTORS, **own[rule]})], [strength])
    np.testing.assert_allclose(to_torch(made["kernel"]), DORA[rule, strength], atol=2e-6)


def test_norms_and_biases():
    layer = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    made = change(layer, [entry({"w_norm": [0.5, -1], "b_norm": [1, 2]})] * 2, [1.0, 0.5])
    np.testing.assert_allclose(made["scale"], [1.75, -0.5])
    np.testing.assert_allclose(made["bias"], [1.5, 3])
    assert change({"kernel": kernel(WEIGHT), **layer}, [entry({"diff_b": [1, 2]})], [1.0]).keys() == {"bias"}


def test_several_differences_are_of_the_same_weight():
    pair = [entry({"ia3": [[0.1], [-0.2]]}), entry({"diff": DELTA})]
    for order in (pair, pair[::-1]):
        made = change({"kernel": kernel(WEIGHT)}, order, [1.0, 1.0])
        np.testing.assert_allclose(to_torch(made["kernel"]), WEIGHT * [[1.1], [0.8]] + DELTA, rtol=1e-6)
