"""Cascades: one call of several models is what calls of each, one after another, make."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import zoo
from PIL import Image

import sample
import sdjax
from sdjax.cli.records import CHUNK
from sdjax.core.errors import UserError
from sdjax.diffusion_model import sampling

SIDE, STEPS = zoo.SIDE, 3
OWN = {"noise_level": 7, "steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def stages(folder_of):
    """A model of text, and two upscalers of latents: one reads prompts, the other does not."""
    return [folder_of(name) for name in ("sd1", "x4_upscaler", "super_resolution")]


@pytest.fixture(scope="module")
def cascade(stages):
    return sdjax.load(stages[0], then=stages[1:])


def test_one_call_is_the_stages_one_after_another(cascade, stages):
    """To the bit, with settings of each stage's own, for several prompts and images of each."""
    common = {"num_images": 2, "seed": 4, "batch_size": 1}
    prompts = ["red heart", "blue cat"]
    made = cascade(prompts, "grey", steps=STEPS, stages=[OWN, "steps=2"], output="stages", **common)
    assert [images.shape[1] for images in made] == [SIDE, 2 * SIDE, 8 * SIDE]
    base, first, second = (sdjax.load(folder) for folder in stages)
    images = base(prompts, "grey", steps=STEPS, **common)
    np.testing.assert_array_equal(made[0], images)
    for number, image in enumerate(images):
        how = {"seed": 4, "first_index": number, "batch_size": 1}
        larger = first(prompts[number // 2], "grey", init_image=image.clip(0, 1), **OWN, **how)[0]
        np.testing.assert_array_equal(made[1][number], larger)
        last = second(init_image=larger.clip(0, 1), steps=2, **how)[0]
        np.testing.assert_array_equal(made[2][number], last)
    np.testing.assert_array_equal(cascade(prompts, "grey", steps=STEPS, stages=[OWN, "steps=2"], **common), made[2])


def test_progress_counts_the_calls_of_all_stages(cascade):
    told = []
    cascade("cat", steps=STEPS, stages=["steps=2"], batch_size=1, progress=lambda *now: told.append(now))
    done, totals = zip(*told, strict=True)
    calls = STEPS + 2 + 50
    assert set(totals) == {calls}
    assert done == tuple(range(1, calls + 1))


def test_other_settings_of_a_stage_compile_nothing(cascade, compilations):
    cascade("cat", steps=STEPS, stages=[OWN, "steps=2"], batch_size=1)
    compilations.clear()
    cascade("dog", steps=2, stages=[{**OWN, "noise_level": 3, "sampler": "euler"}, "steps=1"], seed=9, batch_size=1)
    assert not compilations


def test_the_script_writes_the_last_stage_and_makes_it_again(cascade, stages, tmp_path, monkeypatch, capsys):
    flags = [f"--config={zoo.__file__.rsplit('/', 1)[0]}/pipeline/plain_config.py", f"--outdir={tmp_path / 'a'}"]
    given = [f"--checkpoint={stages[0]}", f"--then={stages[1]}", "--stages=steps=2,noise_level=7", "--steps=2"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags, *given, "--prompt=red heart", "--seed=3"])
    sample.main()
    image = Image.open(tmp_path / "a" / "00000.png")
    assert image.size == (2 * SIDE, 2 * SIDE)
    record = json.loads(image.text[CHUNK])
    assert record["stages"] == "steps=2,noise_level=7"
    again = [flags[0], f"--outdir={tmp_path / 'b'}", f"--from_image={tmp_path / 'a' / '00000.png'}"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *again])
    sample.main()
    capsys.readouterr()
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "b" / "00000.png")))


FAULTS = {
    "too_many": (["steps=1"] * 3, "settings of 3 later stages are given; sd1 has 2"),
    "unknown": (["speed=2"], "unknown option 'speed' in stages"),
    "not_its_own": ([{"seed": 3}], "unknown option 'seed' in stages"),
    "a_file": (["wildcard_dir=/etc"], "unknown option 'wildcard_dir' in stages"),
    "no_value": (["steps"], "write steps=30,guidance_scale=4"),
    "level": (["noise_level=1000"], "noise_level 1000"),
    "idle": (["", "noise_level=3"], "super_resolution.*noise_level 3 changes nothing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_call_are_one_line_before_a_network_runs(cascade, name, monkeypatch):
    given, said = FAULTS[name]
    monkeypatch.setattr(sampling, "sample", None)
    with pytest.raises(UserError, match=said) as raised:
        cascade("cat", stages=given)
    assert "\n" not in str(raised.value)


def test_faults_of_an_order_are_one_line(folder_of):
    with pytest.raises(UserError, match="then adm: it makes images of 16x16 pixels, sd1 those of 16x16"):
        sdjax.load(folder_of("sd1"), then=folder_of("adm"))
    with pytest.raises(UserError, match="stages: settings of 1 later stages are given; sd1 has 0"):
        sdjax.load(folder_of("sd1"))("cat", stages=["steps=2"])
