"""Every system trains and samples the same on every mesh: of one process, of two and of four."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zoo
from children import HASTY
from PIL import Image
from tiny_checkpoints import tiny_checkpoint
from torch_reference import drawn

import train
from configs import openmoji, stable_diffusion_training
from sdjax.checkpoints.checkpoint import FORMATS, Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.parallel.mesh import shapes_of, text_of

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("on_meshes.py")
# Other systems, on a few meshes each.
OTHERS = {
    "adm": "configs/pixels.py:adm_64_tiny",
    "classifier": "configs/classifiers.py:adm_64_tiny",
    "captions": "configs/imagen.py:openmoji_base_tiny",
    "captions_upscaler": "configs/imagen.py:openmoji_sr64_tiny",
    "clip": "configs/clip.py:tiny",
    "controlnet": "configs/controlnet.py",
    "dreambooth": "configs/dreambooth.py",
    "lora": "configs/lora.py",
    **{name: f"configs/ldm.py:{name}_tiny" for name in ("celebahq", "cin256", "layout", "semantic", "inpainting")},
}
# What they learn, beside a model that is given: hints are made of the images; class images are the images themselves.
ADAPTED = {
    "controlnet": ["--config.data.control_from=blur:2"],
    "dreambooth": [
        "--config.data.prompt=a photo of sks dog",
        "--config.data.class_prompt=a photo of dog",
        "--config.data.class_folder={folder}",
        "--config.data.class_images=16",
    ],
    "lora": [],
}
EVERY = [text_of(shape) for shape in shapes_of(8)]
TINY = {
    "autoencoder": "configs/openmoji.py:autoencoder_tiny",
    "openmoji": "configs/openmoji.py:tiny",
    **{name: f"configs/stable_diffusion_training.py:{name}" for name in stable_diffusion_training.TINY},
}


def start(case: str, pictures: Path, output: Path, meshes: list[str], devices: int, *flags: str) -> subprocess.Popen:
    """A process with so many virtual devices of its own."""
    command = [
        sys.executable,
        str(SCRIPT),
        f"--config={(TINY | OTHERS)[case]}",
        f"--config.data.source=folder:{pictures}",
    ]
    command += [
        "--config.optim.name=adamw",
        "--config.optim.learning_rate=1e-3",
        f"--output={output}",
        *flags,
        *(f"--mesh={mesh}" for mesh in meshes),
    ]
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {HASTY}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def finish(*running: subprocess.Popen) -> None:
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def compare(case: str, tmp_path: Path, meshes: list[str], names: list[str]) -> None:
    """Losses and norms of gradients to 1e-4 of themselves, images to 2 levels of 255, bytes as the meshes divide."""
    one, *others = (np.load(tmp_path / f"{name}.npz") for name in names)
    assert len(np.unique(one["losses"][0])) == 6
    assert one["pictures"][0].std() > 1.0
    for other in others:
        for mesh, losses, picture, held in zip(meshes, other["losses"], other["pictures"], other["bytes"], strict=True):
            np.testing.assert_allclose(losses, one["losses"][0], rtol=1e-4, err_msg=f"{case} {mesh}")
            difference = np.abs(picture.astype(int) - one["pictures"][0].astype(int)).max()
            assert difference <= 2, f"{case} {mesh}: {difference}"
            if "fsdp" not in mesh and "tensor" not in mesh:
                assert held == one["bytes"][0], mesh
        if case in ("autoencoder", "lora"):  # whose arrays are all too small to be split
            continue
        by_mesh = dict(zip(meshes, other["bytes"].tolist(), strict=True))
        grown = [by_mesh[mesh] for mesh in ("data=8", "data=4,fsdp=2", "data=2,fsdp=4", "fsdp=8") if mesh in by_mesh]
        for fewer, more in itertools.pairwise(grown):
            assert more < 0.8 * fewer, "memory per device falls as fsdp grows"


@pytest.fixture(scope="session")
def first_stage(pictures, tmp_path_factory) -> str:
    """The flag that a config needs whose first stage is not its own."""
    config = openmoji.get_config("autoencoder_tiny")
    config.data.source = f"folder:{pictures}"
    config.train.steps = 1
    return f"--config.task.first_stage={train.train_and_evaluate(config, tmp_path_factory.mktemp('stage') / 'run')}"


QUICK = ["data=8", "data=2,fsdp=4", "fsdp=2,tensor=2,spatial=2"]


@pytest.mark.slow
def test_an_autoencoder_is_the_same_on_two_meshes(pictures, tmp_path):
    """Split over every axis; over `data` alone is test_mesh.py's."""
    meshes = QUICK[1:]
    finish(
        start("autoencoder", pictures, tmp_path / "one.npz", ["data=1"], 1),
        start("autoencoder", pictures, tmp_path / "eight.npz", meshes, 8),
    )
    compare("autoencoder", tmp_path, meshes, ["one", "eight"])


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY)
def test_every_system_is_the_same_on_every_mesh_of_eight(case, pictures, tmp_path, request):
    flags = [request.getfixturevalue("first_stage")] if case == "openmoji" else []
    finish(start(case, pictures, tmp_path / "one.npz", ["data=1"], 1, *flags))
    finish(start(case, pictures, tmp_path / "eight.npz", EVERY, 8, *flags))
    compare(case, tmp_path, EVERY, ["one", "eight"])


@pytest.fixture(scope="session")
def quantised(tmp_path_factory) -> str:
    """The flag for a first stage of f = 4 with a codebook, drawn at random."""
    sizes = zoo.VAES["vq_f4"]
    folder = tmp_path_factory.mktemp("quantised")
    write_component(folder / "vae", "vae", Component(sizes, drawn(FORMATS["vae"].shapes(sizes))))
    return f"--config.task.first_stage={folder}"


@pytest.fixture(scope="session")
def adapted(tmp_path_factory) -> list[str]:
    """The flags for a model that is adapted."""
    folder = tmp_path_factory.mktemp("adapted") / "model"
    write_checkpoint(folder, tiny_checkpoint("sd1", TOKENIZER_FOLDERS / "clip_l", 49408, length=77))
    return [f"--config.task.initial={folder}", "--config.sample.steps=2"]


@pytest.fixture(scope="session")
def annotated(pictures, tmp_path_factory) -> Path:
    """Images with classes, boxes and label maps."""
    folder, lines = tmp_path_factory.mktemp("annotated"), []
    for i in range(16):
        shutil.copy(pictures / f"{i}.png", folder)
        Image.fromarray(np.full((32, 32), i % 3, np.uint8)).save(folder / f"{i}.map.png")
        objects = {"bbox": [[4, 4, 12, 20]], "categories": [i % 3]}
        said = {"label": i % 3, "objects": objects, "label_map": f"{i}.map.png"}
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"colour {i}", **said}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_systems_are_the_same_on_three_meshes(case, annotated, tmp_path, request):
    flags = [request.getfixturevalue("quantised")] if "ldm.py" in OTHERS[case] else []
    flags += [*request.getfixturevalue("adapted"), *ADAPTED[case]] if case in ADAPTED else []
    flags = [flag.format(folder=annotated) for flag in flags]
    finish(start(case, annotated, tmp_path / "one.npz", ["data=1"], 1, *flags))
    finish(start(case, annotated, tmp_path / "eight.npz", QUICK, 8, *flags))
    compare(case, tmp_path, QUICK, ["one", "eight"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["autoencoder", "sd1_tiny", "sdxl_tiny"])
def test_two_and_four_processes_are_as_one(case, pictures, tmp_path):
    meshes = ["data=8", "fsdp=8", "data=2,tensor=2,spatial=2", "spatial=8"]
    finish(start(case, pictures, tmp_path / "one.npz", ["data=1"], 1))
    for count in (2, 4):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            flags = (f"--coordinator=localhost:{probe.getsockname()[1]}", f"--processes={count}")
        target = tmp_path / f"{count}.npz"
        finish(*(start(case, pictures, target, meshes, 8 // count, *flags, f"--process_id={i}") for i in range(count)))
    compare(case, tmp_path, meshes, ["one", "2", "4"])
