"""Models of the LDM paper by sample.py and from Python: every condition, and what is wrong with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch_reference import drawn

import sample
import sdjax
from sdjax.convert.components import ALL_FORMATS, Component
from sdjax.convert.ldm_folder import LDMCheckpoint, write_ldm
from sdjax.core.errors import UserError
from sdjax.models.autoencoder import VARIANTS
from sdjax.models.bert import BertConfig
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.unet2d import UNet2DConfig
from sdjax.tasks.class_conditional import ClassConditioner
from sdjax.tasks.inpainting import HoleConditioner
from sdjax.tasks.latent.networks import sizes_of
from sdjax.tasks.ldm.conditioner import Conditioner
from sdjax.tasks.ldm.tokens import TokenConditioner
from sdjax.tasks.semantic_synthesis import MapConditioner
from sdjax.tasks.super_resolution import LowResolutionConditioner

CONFIG = Path(__file__).parents[2] / "configs/openmoji.py"
FIRST_STAGE = sizes_of(
    {"variant": "vq_f4", "channels": (8, 8, 16), "layers_per_block": 1, "groups": 4, "codes": 64}, VARIANTS, ""
)
BERT = BertConfig(vocab_size=400, width=32, layers=1, heads=1, max_length=11)
CONDITIONERS = {
    "unconditional": Conditioner(),
    "class_conditional": ClassConditioner(ClassEmbedderConfig(3, 32), 2),
    "layout": TokenConditioner(BERT, (399,) * 9 + (0, 399)),
    "semantic_synthesis": MapConditioner(RescalerConfig(4)),
    "super_resolution": LowResolutionConditioner(4),
    "inpainting": HoleConditioner(FIRST_STAGE),
}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of every task, drawn at random."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for task, conditioner in CONDITIONERS.items():
        inputs = 3 + conditioner.concat_channels
        if conditioner.context_width is None:
            unet = UNet2DConfig((32, 64), (1,), (2, 2), in_channels=inputs, layers_per_block=1)
        else:
            unet = UNetConfig((32, 64), (0, 1), 1, (2, 2), 32, in_channels=3, out_channels=3, layers_per_block=1)
        sizes = {"unet": unet, "vae": FIRST_STAGE, **conditioner.components}
        components = {name: Component(size, drawn(ALL_FORMATS[name].shapes(size))) for name, size in sizes.items()}
        settings = {"size": 16, "steps": 2, "guidance_scale": 2.0, **conditioner.settings}
        if task in ("class_conditional", "layout"):
            settings["classes"] = ["cat", "dog"]
        folder = root / task
        folder.mkdir()
        write_ldm(folder, LDMCheckpoint(task, components, SCHEDULER, settings))
        found[task] = folder
    return found


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    picture, small, mask = tmp_path / "picture.png", tmp_path / "small.png", tmp_path / "mask.png"
    Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(picture)
    Image.fromarray(rng.integers(0, 256, (4, 8, 3), np.uint8)).save(small)
    hole = np.zeros((16, 24), np.uint8)
    hole[4:12, 8:20] = 255
    Image.fromarray(hole).save(mask)
    labels, layout = tmp_path / "labels.png", tmp_path / "layout.json"
    Image.fromarray(rng.integers(0, 4, (16, 24)).astype(np.uint8)).save(labels)
    layout.write_text(json.dumps([{"class": "dog", "box": [0.1, 0.2, 0.5, 0.5]}]))
    return {"picture": picture, "small": small, "mask": mask, "labels": labels, "layout": layout}


# task: (its flags, the size of the pictures)
ASKED = {
    "unconditional": (["--width=24", "--height=16"], (16, 24)),
    "class_conditional": (["--class_label=dog"], (16, 16)),
    "layout": (["--layout={layout}"], (16, 16)),
    "semantic_synthesis": (["--label_map={labels}"], (16, 24)),
    "super_resolution": (["--init_image={small}"], (16, 32)),
    "inpainting": (["--init_image={picture}", "--mask={mask}"], (16, 24)),
}


def run(monkeypatch, folder, *flags):
    command = ["sample.py", f"--config={CONFIG}", f"--checkpoint={folder}", *flags]
    monkeypatch.setattr(sys, "argv", command)
    sample.main()


@pytest.mark.parametrize("task", ASKED)
def test_every_condition_has_its_command(task, folders, files, tmp_path, monkeypatch, capsys):
    """Two pictures, a grid and records; the second alone is the second of two; outside of a hole all is given."""
    flags, size = ASKED[task]
    flags = [flag.format(**files) for flag in flags]
    run(monkeypatch, folders[task], *flags, "--num_images=2", "--seed=5", f"--outdir={tmp_path / 'out'}")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    images = [np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png")) for i in (0, 1)]
    assert {image.shape for image in images} == {(*size, 3)}
    assert (images[0] != images[1]).any()
    assert (tmp_path / "out" / "grid.png").is_file()
    record = json.loads((tmp_path / "out" / "00001.json").read_text())
    assert (record["seed"], record["steps"], record["index"]) == (5, 2, 1)
    run(monkeypatch, folders[task], *flags, "--first_index=1", "--seed=5", f"--outdir={tmp_path / 'again'}")
    again = np.asarray(Image.open(tmp_path / "again" / "00001.png")).astype(int)
    assert np.abs(again - images[1]).max() <= 1
    if task == "inpainting":
        given, hole = (np.asarray(Image.open(files[name])) for name in ("picture", "mask"))
        assert (images[0][hole == 0] == given[hole == 0]).all()
        assert (images[0][hole > 0] != given[hole > 0]).any()


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("class_conditional", {"class_label": 2}, "class_label 2: class_conditional has the classes 0 to 1"),
        ("class_conditional", {"class_label": "bird"}, "unknown class 'bird' in class_label; choose one of: cat, dog"),
        ("class_conditional", {}, "class_conditional needs class_label"),
        ("class_conditional", {"class_label": 0, "width": 18}, "18x16 pixels: class_conditional makes sides that"),
        ("class_conditional", {"class_label": 0, "prompt": "x"}, "is not told prompt: a model of class_conditional is"),
        ("unconditional", {"class_label": 0}, "a model of unconditional is told nothing"),
        ("layout", {"layout": [{"class": 0, "box": [0.5, 0, 0.6, 1]}]}, "the box x=0.5, y=0, width=0.6, height=1 is"),
        ("layout", {"layout": [{"class": 7, "box": [0, 0, 1, 1]}]}, "layout 7: layout has the classes 0 to 1"),
        ("layout", {"layout": [{"box": [0, 0, 1, 1]}]}, 'a list of {"class": ..., "box": [x, y, width, height]}'),
        ("layout", {"layout": [{"class": 0, "box": [0, 1]}]}, 'a list of {"class": ..., "box": [x, y, width, height]}'),
        ("layout", {"layout": "none.json"}, "cannot read the layout none.json"),
        ("semantic_synthesis", {"label_map": np.full((8, 8), 9, np.uint8)}, "label_map has the class 9"),
        (
            "inpainting",
            {"init_image": np.zeros((16, 16, 3), np.uint8), "mask": np.zeros((8, 16), np.uint8)},
            "mask has 8x16 pixels, its picture 16x16",
        ),
        ("super_resolution", {"init_image": np.zeros((4, 4, 3), np.uint8), "width": 8}, "width and height are not for"),
    ],
)
def test_wrong_conditions_are_one_line(task, given, message, folders):
    with pytest.raises(UserError) as error:
        sdjax.load_conditional(folders[task])(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_flags_are_one_line(folders, monkeypatch, tmp_path):
    for flags, message in (
        (["--class_label=1", "--clip_skip=1"], "--clip_skip is not for a model that is told classes"),
        (["--class_label=1", "--prompt=a", "--prompt=b"], "give one --prompt"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, folders["class_conditional"], *flags)
    (tmp_path / "00000.png").touch()
    with pytest.raises(UserError, match="exists and is left as it is; choose another --outdir"):
        run(monkeypatch, folders["class_conditional"], "--class_label=1", f"--outdir={tmp_path}")
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--config={CONFIG}", "--prompt=a", "--class_label=1"])
    with pytest.raises(UserError, match="--class_label is for models that are told it; this one paints prompts"):
        sample.main()
    with pytest.raises(UserError, match=r"is no model of classes, layouts, label maps or pictures"):
        sdjax.load_conditional(CONFIG.parents[1] / "checkpoints/openmoji")
