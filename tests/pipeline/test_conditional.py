"""Models of the LDM paper by sample.py and from Python: every condition, and what is wrong with one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch_reference import channels_first, channels_last, drawn

import sample
import sdjax
from sdjax.convert.adm_file import ADM_FAMILIES
from sdjax.convert.components import ALL_FORMATS, Checkpoint, Component
from sdjax.convert.folder import write_checkpoint, write_component
from sdjax.core.errors import UserError
from sdjax.core.prng import image_keys
from sdjax.data.degradation import bicubic
from sdjax.diffusion.samplers import first_noise
from sdjax.models.adm_classifier import ClassifierConfig
from sdjax.models.autoencoder import VARIANTS
from sdjax.models.bert import BertConfig
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.unet2d import UNet2DConfig
from sdjax.tasks.class_conditional import ClassConditioner
from sdjax.tasks.inpainting import HoleConditioner
from sdjax.tasks.latent.networks import sizes_of
from sdjax.tasks.ldm.conditioner import Conditioner
from sdjax.tasks.ldm.model import draw
from sdjax.tasks.ldm.tokens import TokenConditioner
from sdjax.tasks.retrieval import NeighbourConditioner
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
    "retrieval": NeighbourConditioner(24),
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
            unet = UNetConfig(
                (32, 64),
                (0, 1),
                1,
                (2, 2),
                conditioner.context_width,
                in_channels=3,
                out_channels=3,
                layers_per_block=1,
            )
        sizes = {"unet": unet, "vae": FIRST_STAGE, **conditioner.components}
        components = {name: Component(size, drawn(ALL_FORMATS[name].shapes(size))) for name, size in sizes.items()}
        settings = {"size": 16, "steps": 2, "guidance_scale": 2.0, **conditioner.settings}
        if task in ("class_conditional", "layout"):
            settings["classes"] = ["cat", "dog"]
        found[task] = root / task
        made = Checkpoint(components=components, scheduler=SCHEDULER, conditioning=task, settings=settings)
        write_checkpoint(found[task], made)
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
    np.save(tmp_path / "near.npy", rng.standard_normal((5, 24)).astype(np.float32))
    found = {"picture": picture, "small": small, "mask": mask, "labels": labels, "layout": layout}
    return found | {"near": tmp_path / "near.npy"}


# task: (its flags, the size of the pictures)
ASKED = {
    "unconditional": (["--width=24", "--height=16"], (16, 24)),
    "class_conditional": (["--class_label=dog"], (16, 16)),
    "layout": (["--layout={layout}"], (16, 16)),
    "retrieval": (["--neighbours={near}", "--guidance_scale=2"], (16, 16)),
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
        ("retrieval", {"neighbours": np.zeros((4, 5))}, "neighbours have the shape [4, 5]; retrieval wants [k, 24]"),
        ("retrieval", {"neighbours": "none.npy"}, "neighbours: cannot read none.npy"),
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
        (["--class_label=1", "--processes=2"], "--processes is not for a model that is told classes"),
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


def test_a_small_picture_guides_a_model_that_is_told_nothing(folders, files, monkeypatch, tmp_path):
    """The stronger, the nearer are the pictures, made as small; 0 is no guidance; another scale compiles nothing."""
    pipe = sdjax.load_conditional(folders["unconditional"])
    small = np.asarray(Image.open(files["small"]))
    asked = {"width": 32, "height": 16, "steps": 8, "num_images": 2}
    plain = pipe(**asked)
    np.testing.assert_allclose(pipe(**asked, resemble=small, resemble_scale=0.0), plain, atol=1e-4)
    compiled, distances = draw._cache_size(), []
    for scale in (0.0, 0.05, 0.2):
        made = pipe(**asked, resemble=files["small"], resemble_scale=scale)
        made = np.stack([bicubic((image * 255).round().astype(np.uint8), 4, np.random.default_rng()) for image in made])
        distances.append(np.square(made / 255.0 - small / 255.0).mean())
    assert distances[0] > distances[1] > distances[2]
    assert draw._cache_size() == compiled
    with pytest.raises(UserError, match="resemble_scale 2: there is no picture to resemble"):
        pipe(**asked, resemble_scale=2)
    with pytest.raises(UserError, match=r"guidance_scale 2.0: unconditional never learned to be told nothing"):
        pipe(**asked, guidance_scale=2.0)
    with pytest.raises(UserError, match=r"resemble is uint8 \[4, 8\]; a picture of bytes \[h, w, 3\] is needed"):
        pipe(**asked, resemble=small[..., 0])
    for wrong in (small[:3], np.zeros((32, 64, 3), np.uint8)):
        with pytest.raises(UserError, match="pixels, and unconditional makes 32x16: it must have the same proportions"):
            pipe(**asked, resemble=wrong)
    flags = [f"--resemble={files['small']}", "--resemble_scale=0.5", "--width=32", "--height=16"]
    run(monkeypatch, folders["unconditional"], *flags, f"--outdir={tmp_path / 'out'}")
    record = json.loads((tmp_path / "out" / "00000.json").read_text())
    assert (record["resemble"], record["resemble_scale"]) == (str(files["small"]), 0.5)


@pytest.mark.parametrize("task", ["class_conditional", "super_resolution", "inpainting"])
def test_a_picture_draws_models_that_are_told_something(task, folders, files):
    """The classes with guidance on top; outside of a hole nothing moves."""
    told = {"class_conditional": {"class_label": "dog", "guidance_scale": 2.0}}
    told |= {"super_resolution": {"init_image": files["small"]}}
    told |= {"inpainting": {"init_image": files["picture"], "mask": files["mask"]}}
    # A network drawn at random that is also guided by its class has to be drawn harder.
    scales = (0.0, 1.0, 3.0) if task == "class_conditional" else (0.0, 0.05, 0.2)
    pipe, asked = sdjax.load_conditional(folders[task]), {**told[task], "steps": 8, "num_images": 2}
    height, width = pipe(**asked).shape[1:3]
    target = np.random.default_rng(3).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    distances = []
    for scale in scales:
        made = pipe(**asked, resemble=target, resemble_scale=scale)
        small = [bicubic((image * 255).round().astype(np.uint8), 4, np.random.default_rng()) for image in made]
        distances.append(np.square(np.stack(small) / 255.0 - target / 255.0).mean())
        if task == "inpainting":
            given, hole = (np.asarray(Image.open(files[name])) for name in ("picture", "mask"))
            assert (np.round(made[:, hole == 0] * 255) == given[hole == 0]).all()
    assert distances[0] > distances[1] > distances[2]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A model of pictures of three classes, and a classifier of five."""
    root = tmp_path_factory.mktemp("pixels")
    unet = UNet2DConfig((32, 64), (1,), (1, 2), out_channels=6, layers_per_block=1, classes=3, scale_shift=True)
    params = drawn(ALL_FORMATS["unet"].shapes(unet))
    scheduler = ADM_FAMILIES["adm_256"].scheduler
    components = {"unet": Component(unet, params, {"sample_size": 16})}
    made = Checkpoint(components=components, scheduler=scheduler, conditioning="class_conditional")
    write_checkpoint(root / "model", made)
    judge = ClassifierConfig(UNet2DConfig((32, 64), (1,), (1, 1), layers_per_block=1, resblock_updown=True), 16, 5)
    for size in (16, 8):
        judge = dataclasses.replace(judge, size=size)
        component = Component(judge, drawn(ALL_FORMATS["classifier"].shapes(judge)))
        write_component(root / f"guide_{size}" / "classifier", "classifier", component)
    return root


def test_pictures_of_pixels_have_their_command(pixels, tmp_path, monkeypatch, capsys):
    """A picture by its number, a classifier that changes it, records, and what is wrong in one line."""
    flags = ["--class_label=2", "--steps=4", "--num_images=2", "--seed=5"]
    run(monkeypatch, pixels / "model", *flags, f"--outdir={tmp_path / 'out'}")
    images = [np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png")) for i in (0, 1)]
    assert (images[0] != images[1]).any()
    run(monkeypatch, pixels / "model", *flags, "--first_index=1", "--num_images=1", f"--outdir={tmp_path / 'again'}")
    assert np.abs(np.asarray(Image.open(tmp_path / "again" / "00001.png")).astype(int) - images[1]).max() <= 1
    guide = [f"--classifier={pixels / 'guide_16'}", "--classifier_scale=5"]
    run(monkeypatch, pixels / "model", *flags, *guide, f"--outdir={tmp_path / 'guided'}")
    assert (np.asarray(Image.open(tmp_path / "guided" / "00000.png")) != images[0]).any()
    record = json.loads((tmp_path / "guided" / "00001.json").read_text())
    assert (record["class_label"], record["classifier_scale"]) == ("2", 5.0)
    for changed, message in (
        ((), "model needs class_label: a number from 0 to 2"),
        (("--class_label=3",), "class_label 3: model has the classes 0 to 2"),
        (("--class_label=1", "--prompt=x"), "model is not told prompt"),
        (("--class_label=1", "--classifier_scale=2"), "model has no classifier beside it"),
        (("--class_label=1", "--guidance_scale=2"), "--guidance_scale is not for model, a model of pixels"),
        (("--class_label=1", f"--tokenizer={pixels}"), "a model of class_conditional reads no words"),
        (("--class_label=1", f"--classifier={pixels}"), "there is no classifier in"),
        (("--class_label=1", f"--classifier={pixels / 'guide_8'}"), "its classifier knows those of 8"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, pixels / "model", *changed, f"--outdir={tmp_path / 'wrong'}")
    assert not (tmp_path / "wrong").exists()


def test_a_model_of_pixels_makes_what_diffusers_makes(pixels):
    """DDIM of four steps from the same noise, told a class: to 1e-3."""
    pipe = sdjax.load_conditional(pixels / "model")
    theirs = diffusers.UNet2DModel.from_pretrained(pixels / "model" / "unet")
    scheduler = diffusers.DDIMScheduler.from_config(pipe._scheduler, clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    x = channels_first(np.array(first_noise(image_keys(3, jnp.arange(2)), (16, 16, 3))))
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = theirs(x, t, class_labels=torch.tensor([2, 2])).sample[:, :3]
            x = scheduler.step(output, t, x, eta=0.0).prev_sample
    wanted = channels_last((x / 2 + 0.5).clamp(0, 1))
    assert wanted.std() > 0.05
    found = pipe(class_label=2, sampler="ddim", steps=4, seed=3, num_images=2)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
