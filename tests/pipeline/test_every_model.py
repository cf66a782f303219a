"""One load and one call for every kind of model: what one of them can do, all of them can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import jax
import numpy as np
import pytest
from every_model import KINDS, STEPS, flags_of, options_of, sources_of
from PIL import Image

import sample
import sdjax
from sdjax.core.errors import UserError
from sdjax.diffusion_model import sampling

HERE = Path(__file__).parent


def run(monkeypatch, flags: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    sample.main()


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", KINDS)
def test_every_model(name, files, folder_of, tmp_path, monkeypatch, capsys):
    kind, folder = KINDS[name], folder_of(name)
    pipe = sdjax.load(folder, **sources_of(kind, files))
    common = {"steps": STEPS, "batch_size": 2, "seed": 5, **options_of(kind, files)}
    images = pipe(kind.prompt, num_images=3, **common)
    assert images.std() > 0.05
    assert np.abs(images[0] - images[1]).max() > 0.01

    # Any number of images, another seed, sampler, and number of steps: one compiled sampler, and the same images.
    compiled = sampling.sample.compiled()._cache_size()
    np.testing.assert_array_equal(pipe(kind.prompt, **common), images[:1])
    # At another place of a batch, rounding may differ.
    later = pipe(kind.prompt, num_images=2, first_index=1, **common)
    np.testing.assert_allclose(later, images[1:], atol=1e-5)
    other = pipe(kind.prompt, **{**common, "seed": 6, "steps": 2, "sampler": "euler_a"})
    assert np.abs(other - images[:1]).max() > 0.01
    assert sampling.sample.compiled()._cache_size() == compiled

    # A prompt file (or a file of settings alone), a grid, and an image again from itself.
    flags = flags_of(kind, files, folder)
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"{kind.prompt or ''} --seed {seed}\n" for seed in (5, 6)))
    run(monkeypatch, [*flags, f"--from_file={lines}", f"--outdir={tmp_path / 'lines'}"])
    first = read(tmp_path / "lines" / "00000.png")
    np.testing.assert_array_equal(first, (images[0] * 255.0).round().astype(np.uint8))
    prompt = [] if kind.prompt is None else [f"--prompt={kind.prompt}"]
    run(monkeypatch, [*flags, *prompt, "--grid=seed=5,6", f"--outdir={tmp_path / 'grid'}"])
    np.testing.assert_array_equal(read(tmp_path / "grid" / "00000.png"), first)
    assert (read(tmp_path / "grid" / "00001.png") != first).any()
    assert (tmp_path / "grid" / "grid.png").is_file()
    record = json.loads((tmp_path / "lines" / "00000.json").read_text())
    assert (record["seed"], record["steps"], record["index"], record["model"]) == (5, STEPS, 0, name)
    again = [
        f"--from_image={tmp_path / 'grid' / '00000.png'}",
        f"--outdir={tmp_path / 'again'}",
        flags[0],
        "--batch_size=2",
    ]
    run(monkeypatch, again)
    np.testing.assert_array_equal(read(tmp_path / "again" / "00000.png"), first)
    assert sampling.sample.compiled()._cache_size() == compiled
    capsys.readouterr()

    # Weights that are not finite are refused by the name of the stage and of the model: never a black image.
    conv = pipe.params["unet"]["conv_out"]
    pipe.params["unet"]["conv_out"] = {**conv, "bias": conv["bias"].at[0].set(np.nan)}
    with pytest.raises(UserError, match=f"the UNet's output at network call 1 of .* is not finite: .* {name} hold"):
        pipe(kind.prompt, **common)


@pytest.fixture(scope="module")
def on_one_device(files, folder_of) -> dict[str, np.ndarray]:
    """Four images of each kind of model."""
    made = {}
    for name, kind in KINDS.items():
        pipe = sdjax.load(folder_of(name), **sources_of(kind, files))
        made[name] = pipe(kind.prompt, num_images=4, steps=STEPS, batch_size=4, seed=5, **options_of(kind, files))
    return made


def start_devices(count: int, folder_of, files, *arguments: object) -> subprocess.Popen:
    """every_model_on_devices.py with so many virtual devices."""
    environment = os.environ | {"XLA_FLAGS": children.devices(count), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, HERE / "every_model_on_devices.py", folder_of("sd1").parent, files["image"].parent]
    return subprocess.Popen([*map(str, script), *map(str, arguments)], env=environment)


@pytest.mark.slow
def test_every_model_on_a_mesh(on_one_device, files, folder_of, tmp_path):
    """On four virtual devices the same images to 1e-5 of one device's."""
    assert start_devices(4, folder_of, files, tmp_path / "mesh.npz").wait(timeout=3000) == 0
    with np.load(tmp_path / "mesh.npz") as found:
        for name, images in on_one_device.items():
            np.testing.assert_allclose(found[name], images, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_every_model_by_two_processes(on_one_device, files, folder_of, tmp_path):
    """They share the files of each model: the images of one device within a level of 255."""
    port = children.free_port()
    running = [start_devices(2, folder_of, files, tmp_path, port, number) for number in range(2)]
    assert [process.wait(timeout=3000) for process in running] == [0, 0]
    for name, images in on_one_device.items():
        for index in range(2):
            found = read(tmp_path / name / f"{index:05d}.png").astype(int)
            assert np.abs(found - (images[index] * 255.0).round()).max() <= 1, name
        assert (tmp_path / name / "grid.png").is_file()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("class_conditional", {"class_label": 2}, "class_label 2: class_conditional has the classes 0 to 1"),
        ("class_conditional", {"class_label": "bird"}, "unknown class 'bird' in class_label; choose one of: cat, dog"),
        ("class_conditional", {}, "class_conditional needs class_label"),
        ("class_conditional", {"class_label": 0, "width": 18}, "width 18 is not a multiple of 4"),
        (
            "class_conditional",
            {"class_label": 0, "prompts": "x"},
            "class_conditional takes no prompt; it is",
        ),
        ("class_conditional", {"class_label": 0, "clip_skip": 1}, "clip_skip 1 changes nothing: class_conditional is"),
        ("unconditional", {"class_label": 0}, "class_label 0 changes nothing: unconditional is conditioned on nothing"),
        (
            "unconditional",
            {"guidance_scale": 2.0},
            "guidance_scale 2: unconditional was trained without condition",
        ),
        ("unconditional", {"resemble_scale": 2.0}, "resemble_scale 2 changes nothing without resemble"),
        (
            "unconditional",
            {"resemble": np.zeros((8, 4, 3), np.uint8)},
            "resemble has 4x8 pixels, and unconditional",
        ),
        ("layout", {"layout": [{"class": 0, "box": [0.5, 0, 0.6, 1]}]}, "the box x=0.5, y=0, width=0.6, height=1 is"),
        ("layout", {"layout": [{"class": 7, "box": [0, 0, 1, 1]}]}, "layout 7: layout has the classes 0 to 1"),
        ("layout", {"layout": [{"box": [0, 0, 1, 1]}]}, 'a list of {"class": ..., "box": [x, y, width, height]}'),
        ("layout", {"layout": [{"class": 0, "box": [0, 1]}]}, 'a list of {"class": ..., "box": [x, y, width, height]}'),
        ("layout", {"layout": "none.json"}, "cannot read none.json"),
        ("semantic_synthesis", {"label_map": np.full((8, 8), 9, np.uint8)}, "label_map holds uint8 [8, 8] up to 9"),
        (
            "inpainting",
            {"init_image": np.zeros((16, 16, 3), np.uint8), "mask": np.zeros((8, 16), np.uint8)},
            "the mask is 16x8 pixels and its init_image 16x16; give a mask of 16x16",
        ),
        ("retrieval", {"neighbours": np.zeros((4, 5))}, "neighbours have the shape [4, 5]; retrieval wants [k, 24]"),
        ("retrieval", {"neighbours": "none.npy"}, "neighbours: cannot read none.npy"),
        ("super_resolution", {"init_image": np.zeros((4, 4, 3), np.uint8), "width": 8}, "width and height have no eff"),
        ("adm", {}, "adm needs class_label"),
        ("adm", {"class_label": 10}, "class_label 10: adm has the classes 0 to 9"),
        ("adm", {"class_label": 1, "classifier_scale": 2.0}, "classifier_scale 2.0 changes nothing"),
        (
            "x4_upscaler",
            {"prompts": "a", "init_image": np.zeros((8, 8, 3), np.uint8), "noise_level": 20},
            "noise_level",
        ),
        ("sd1", {"prompts": "a", "depth": np.zeros((8, 8))}, "depth changes nothing: sd1 is conditioned on prompt"),
        ("sd1", {}, "sd1 needs a prompt"),
    ],
)
def test_wrong_inputs_are_one_line(name, given, message, folder_of):
    pipe = sdjax.load(folder_of(name))
    with pytest.raises(UserError) as error:
        pipe.prepare(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_old_name_of_load_warns(folder_of):
    with pytest.warns(FutureWarning, match="load_conditional is now load"):
        pipe = sdjax.load_conditional(folder_of("unconditional"))
    assert pipe.prepare(num_images=2)[1].index == 1


def test_a_guide_of_the_wrong_size_or_kind_is_one_line(files, folder_of):
    with pytest.raises(UserError, match="classifiers guide models of pixels, which unconditional is not"):
        sdjax.load(folder_of("unconditional"), classifier=files["classifier"])
    with pytest.raises(UserError, match="there is no classifier in"):
        sdjax.load(folder_of("adm"), classifier=files["image"].parent)
    with pytest.raises(UserError, match="a model of unconditional reads no words"):
        sdjax.load(folder_of("unconditional"), tokenizer=files["words"])
    for option, kind in {"ip_adapter": "IP-Adapter", "t2i_adapter": "T2I-Adapter"}.items():
        for name in ("unconditional", "adm"):
            with pytest.raises(UserError, match=f"^{option} 'any.bin': {kind}s are for models of Stable Diffusion's$"):
                sdjax.load(folder_of(name), **{option: "any.bin"})


@pytest.mark.parametrize("name", ["unconditional", pytest.param("inpainting", marks=pytest.mark.slow)])
def test_an_image_guides_any_model(name, files, folder_of):
    """The stronger, the nearer are the images, made as small (LDM, appendix C); another scale compiles nothing."""
    small = np.asarray(Image.open(files["quarter"])) / 255.0
    pipe, common = sdjax.load(folder_of(name)), {"steps": 8, "num_images": 2, **options_of(KINDS[name], files)}
    plain = pipe(**common)
    distances, compiled = [], 0
    for scale in (0.0, 0.02, 0.05):
        made = pipe(**common, resemble=str(files["quarter"]), resemble_scale=scale)
        compiled = compiled if distances else sampling.sample.compiled()._cache_size()
        if scale == 0.0:
            np.testing.assert_allclose(made, plain, atol=1e-4)
        shrunk = jax.image.resize(made, (2, *small.shape), "cubic", antialias=True)
        distances.append(float(np.square(shrunk - small).mean()))
        if name == "inpainting":
            given, mask = (np.asarray(Image.open(files[n])) for n in ("image", "mask"))
            assert (np.round(made[:, mask == 0] * 255) == given[mask == 0]).all()
    assert sampling.sample.compiled()._cache_size() == compiled
    assert distances[0] > distances[1] > distances[2]
