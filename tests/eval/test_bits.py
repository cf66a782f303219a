"""Bits per dimension by the command, of a small model of pixels."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest
from PIL import Image
from torch_reference import drawn

from configs import pixels
from sdjax.core.errors import UserError
from sdjax.eval import __main__ as command
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.make import make_task


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = pixels.get_config("iddpm_64_tiny")
    config.model.unet.update(channels=(32,), heads=(1,), attention_levels=())
    task = make_task(config, make_mesh({"data": -1}))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)))
    # A network that says no noise, and a variance in the middle of its range.
    params["unet"]["conv_out"] = jax.tree.map(np.zeros_like, params["unet"]["conv_out"])
    task.export(params, folder)
    return folder


def run(monkeypatch, capsys, *flags: str) -> dict[str, float]:
    monkeypatch.setattr(sys, "argv", ["eval", *flags])
    command.main()
    return {name: float(value) for name, value in (line.split(": ") for line in capsys.readouterr().out.splitlines())}


def test_each_variance_has_its_bits(model, tmp_path, monkeypatch, capsys):
    """A network that is sure of no noise pays most with the smallest variance; batches of another size change nothing
    but the draws of the noise."""
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    flags = (f"--pixels={model}", f"--real={tmp_path}", "--steps=4")
    found = run(monkeypatch, capsys, *flags, "--batch_size=5")
    names = [f"bits_per_dimension_{kind}_4" for kind in ("learned", "fixed_small", "fixed_large")]
    assert list(found) == names
    learned, small, large = found.values()
    assert small > learned > large > 0.0
    other = run(monkeypatch, capsys, *flags, "--batch_size=2")
    assert other[names[1]] == pytest.approx(small, rel=0.2)
    with pytest.raises(UserError, match="1 respaced steps; choose 2 to 1000"):
        run(monkeypatch, capsys, *flags[:2], "--steps=1")
