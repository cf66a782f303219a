"""Every condition on OpenMoji, trained by the published commands: ten to forty minutes each on a CPU core.

`-rP` shows the figures. With SDJAX_RUNS=FOLDER the trainings stand in FOLDER, where a later run finds those that are
finished and goes on with those that are not; runs beside each other share them.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import filelock
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_shipped_lora import cosine, hue

import sdjax
import train
from configs import autoencoders, classifiers, lora, openmoji_ldm, pixels
from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.core.tree import flatten, merge, unflatten
from sdjax.data.images import to_uint8
from sdjax.data.sources import open as sources
from sdjax.data.sources.openmoji_parts import GROUPS, PALETTE, SHAPES
from sdjax.data.transforms import images as transforms
from sdjax.data.transforms.degradation import bicubic
from sdjax.data.transforms.masks import RandomMask
from sdjax.eval.bits import bits
from sdjax.eval.similarity import psnr
from sdjax.models.autoencoder import autoencoder_of
from sdjax.models.lora import LORA
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.autoencoder import reconstruct
from sdjax.tasks.classifier import classify, read_classifier
from sdjax.tasks.make import make_task

pytestmark = pytest.mark.slow
RUNS = "SDJAX_RUNS"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The export of a config's training, done once."""
    root = Path(os.environ[RUNS]) if RUNS in os.environ else tmp_path_factory.mktemp("runs")

    def train_once(config, name: str) -> Path:
        with filelock.FileLock(root / f"{name}.lock"):
            return Path(train.train_and_evaluate(config, root / name))

    return train_once


def held_out(side: int, name: str = "openmoji"):
    pictures = grain.MapDataset.source(sources.source(name, "held_out")).map(transforms.Square(side))
    return [pictures[i] for i in range(len(pictures))]


@pytest.fixture(scope="module")
def first_stage(trained):
    return trained(autoencoders.get_config("openmoji_kl"), "kl")


@pytest.fixture(scope="module")
def classifier_folder(trained):
    return trained(classifiers.get_config("openmoji"), "classifier")


@pytest.fixture(scope="module")
def classifier(classifier_folder):
    return read_classifier(classifier_folder)


@pytest.fixture(scope="module")
def pixel_model(trained):
    return trained(pixels.get_config("openmoji"), "pixels")


@pytest.fixture
def pipeline(trained, first_stage):
    """A variant of configs/openmoji_ldm.py, ready to be called."""

    def make(name: str):
        config = openmoji_ldm.get_config(name)
        config.task.first_stage = str(first_stage)
        return sdjax.load(trained(config, name))

    return make


def quality(folder) -> float:
    """Mean PSNR of the held-out images, in dB."""
    vae = read_component(folder / "vae", "vae")
    images = np.stack([row["image"] for row in held_out(64)])
    parts = [reconstruct(autoencoder_of(vae.config), vae.params, images[i : i + 30]) for i in range(0, len(images), 30)]
    return float(psnr(images / 255.0, np.concatenate(parts)).mean())


def test_a_kl_first_stage_passes_22_db(first_stage):
    found = quality(first_stage)
    print(f"KL: {found:.2f} dB")
    assert found > 22.0


def test_a_vq_first_stage_passes_22_db(trained):
    found = quality(trained(autoencoders.get_config("openmoji_vq"), "vq"))
    print(f"VQ: {found:.2f} dB")
    assert found > 22.0


def test_holes_are_filled_better_than_by_the_mean_colour(pipeline):
    """Less squared error in the hole than the mean of what is around it; all around it is the given image."""
    pipe, rng = pipeline("inpainting"), np.random.default_rng(0)
    ours, plain = [], []
    for row in held_out(64)[:48]:
        image = row["image"]
        mask = RandomMask(0.05, 0.4).random_map(row, rng)["mask"][..., 0]
        made, hole = pipe(init_image=image, mask=mask * np.uint8(255))[0], mask > 0
        np.testing.assert_array_equal(np.round(made[~hole] * 255), image[~hole])
        ours.append(np.square(made - image / 255.0)[hole].mean())
        plain.append(np.square(image[~hole].mean(0) / 255.0 - image / 255.0)[hole].mean())
    print(f"squared error in the hole: {np.mean(ours):.4f}, of the mean colour {np.mean(plain):.4f}")
    assert np.mean(ours) < np.mean(plain)


def test_super_resolution_beats_bicubic(pipeline):
    pipe, ours, plain = pipeline("super_resolution"), [], []
    for row in held_out(128)[:32]:
        small = bicubic(row["image"], 4, np.random.default_rng(0))
        large = transforms.square(small, 128, transforms.Image.Resampling.BICUBIC)
        truth = row["image"][None] / 255.0
        ours.append(psnr(truth, pipe(init_image=small)))
        plain.append(psnr(truth, large[None] / 255.0))
    print(f"super-resolution: {np.mean(ours):.2f} dB, bicubic {np.mean(plain):.2f} dB")
    assert np.mean(ours) > np.mean(plain)


def test_a_layout_puts_the_colour_into_the_box(pipeline):
    """The mean colour of a box's middle is nearer to that of the asked shape than to any other colour's, in most."""
    pipe, right = pipeline("layout"), []
    wanted = {"red": (234, 90, 71), "yellow": (252, 234, 43), "green": (177, 204, 51), "purple": (137, 103, 170)}
    boxes = ([0.1, 0.1, 0.4, 0.4], [0.5, 0.4, 0.4, 0.4], [0.05, 0.55, 0.4, 0.4])
    for color in wanted:
        for box in boxes:
            image = pipe(layout=[{"class": SHAPES.index(f"{color} square"), "box": box}], seed=1)[0]
            x, y, w, h = (round(v * len(image)) for v in box)
            middle = 255 * image[y + h // 4 : y + 3 * h // 4, x + w // 4 : x + 3 * w // 4].mean((0, 1))
            distances = {name: np.abs(middle - value).sum() for name, value in wanted.items()}
            distances["white"] = np.abs(middle - 255).sum()
            right.append(min(distances, key=lambda name: distances[name]) == color)
    print(f"asked colour in the box: {np.sum(right)} of {len(right)}")
    assert np.mean(right) > 0.6


def test_a_label_map_decides_the_colours(pipeline):
    """Of what is neither white nor a black line, more pixels have their label's colour than another map's."""
    pipe, rows = pipeline("regions"), held_out(64, "openmoji_regions")[:48]
    palette = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in PALETTE])
    own, others = [], []
    for row, another in zip(rows, [*rows[24:], *rows[:24]], strict=True):
        image = 255 * pipe(label_map=row["label_map"], seed=1)[0]
        painted = np.square(image[:, :, None] - palette).sum(-1).argmin(-1)
        for shares, labels in ((own, row["label_map"]), (others, another["label_map"])):
            shares.append((painted == labels)[labels > 1].mean())
    print(f"pixels in the colour of their label: {np.mean(own):.3f}, of another map's {np.mean(others):.3f}")
    assert np.mean(own) > 2.0 * np.mean(others)


def test_samples_of_a_class_are_taken_for_it(pipeline, classifier):
    """By a classifier of real images, three times as often as chance."""
    pipe, (model, params), right = pipeline("classes"), classifier, []
    for label in range(len(GROUPS)):
        images = pipe(class_label=label, num_images=16, guidance_scale=2.0)
        small = np.stack([transforms.square((image * 255).astype(np.uint8), 32) for image in images])
        right.append((classify(model, params, small).argmax(-1) == label).mean())
    print(f"taken for their class: {np.mean(right):.3f}; by class {np.round(right, 2)}")
    assert np.mean(right) > 3.0 / len(GROUPS)


def test_guidance_makes_the_classifier_surer(pixel_model, classifier_folder, classifier):
    """Monotonically over scales 0, 1 and 4, in ADM's ancestral steps."""
    model, judge = classifier
    pipe, labels, sure = sdjax.load(pixel_model, classifier=classifier_folder), np.arange(40) % len(GROUPS), []
    for scale in (0.0, 1.0, 4.0):
        images = pipe(class_label=labels.tolist(), classifier_scale=scale, sampler="ddpm", steps=25, batch_size=40)
        logits = jax.nn.log_softmax(classify(model, judge, to_uint8(images)))
        sure.append(float(np.exp(logits[np.arange(40), labels]).mean()))
    print(f"confidence at scales 0, 1, 4: {np.round(sure, 3)}")
    assert sure[0] < sure[1] < sure[2]


def test_a_learned_variance_costs_fewer_bits_in_50_steps(pixel_model):
    """iDDPM's claim, on held-out images."""
    found = bits(pixel_model, sources.source("openmoji", "held_out"), 50, 30)
    print(found)
    learned = found.pop("bits_per_dimension_learned_50")
    assert learned < min(found.values())


CONCEPTS = {"zork": "brg", "vlim": "gbr", "quaf": "bgr", "wexo": "grb"}
"""New words, and the colours that they stand for."""


@pytest.fixture
def learnt(trained):
    """learnt(name, weight): workdirs of four concepts, learnt one after another with a penalty of this weight."""

    def learn(name: str, weight: float) -> list[str]:
        runs: list[str] = []
        for word, order in CONCEPTS.items():
            config = lora.get_config("openmoji_concept")
            config.data.source = f"openmoji_recoloured:{order}:{word}"
            if runs:  # before the first there is nothing to forget
                config.task.lora.update(past=tuple(runs), forgetting=weight)
            runs.append(str(trained(config, f"{name}_{len(runs)}" if runs else "concept_0").parent))
        return runs

    return learn


def agreement(pipe, word: str, strengths: list[float]) -> float:
    """Mean cosine between the hues of samples and of 12 held-out drawings in a concept's colours."""
    drawings = sources.open_rows(f"openmoji_recoloured:{CONCEPTS[word]}", "held_out")
    rows = [drawings[i] for i in range(0, 192, 2)]
    rows = [row for row in rows if np.linalg.norm(hue(row["image"])) > 20.4][::2][:12]
    prompts = [f"{word} {row['caption']}" for row in rows]
    images = pipe(prompts, lora_scale=strengths, steps=10, guidance_scale=2.5, seed=0)
    return float(np.mean([cosine(hue(image), hue(row["image"])) for image, row in zip(images, rows, strict=True)]))


@pytest.fixture(scope="module")
def loss_of():
    """loss_of(runs)(word, strengths): a concept's loss on 96 of its drawings, always of the same noise."""
    mesh = make_mesh({"data": -1})

    def load(runs: list[str]):
        config = lora.get_config("openmoji_concept")
        config.task.lora.update(past=tuple(runs), forgetting=0.0, rank=1)  # own factors, which change nothing yet
        tasks = {}
        for word, order in CONCEPTS.items():
            config.data.source = f"openmoji_recoloured:{order}:{word}"
            tasks[word] = make_task(config.copy_and_resolve_references(), mesh)
        task = tasks["zork"]
        params = flatten(merge(task.pretrained(sharded_put(mesh)), task.init(jax.random.key(0))))
        loaders = {word: task.batch(unflatten(params)) for word, task in tasks.items()}
        batches = {word: [next(loader) for _ in range(12)] for word, loader in loaders.items()}
        loss = jax.jit(lambda params, batch, key: task.loss(unflatten(params), batch, key, 0)[0])

        def measure(word: str, strengths: list[float]) -> float:
            ends = {f"/{LORA}/{i}/scale": jnp.float32(strength) for i, strength in enumerate(strengths)}
            scales = {name: strength for end, strength in ends.items() for name in params if name.endswith(end)}
            found = [loss({**params, **scales}, batch, jax.random.key(i)) for i, batch in enumerate(batches[word])]
            return float(np.mean(found))

        return measure

    return load


def stages(measure) -> np.ndarray:
    """A measure of each concept before any training, after its own, and after the last one's."""
    steps = [[1.0] * done + [0.0] * (4 - done) for done in range(5)]
    return np.array([[measure(word, steps[n]) for n in (0, i + 1, 4)] for i, word in enumerate(CONCEPTS)]).T


def test_c_lora_forgets_less_than_one_lora_after_another(learnt, loss_of):
    """Of four concepts the first three, from their own training to the last one's; all are learnt either way."""
    forgotten = {}
    for name, weight in {"plain": 0.0, "clora": 1.0}.items():
        runs = learnt(name, weight)
        pipe = sdjax.load("checkpoints/openmoji", lora=runs)
        before, after, end = stages(loss_of(runs))
        forgotten[name] = (end - after)[:3].mean()
        print(f"{name}: loss before {before.round(4)}, after {after.round(4)}, at the end {end.round(4)}")
        print(f"  forgotten: {forgotten[name]:.4f}; all at the end: {end.mean():.4f}")
        assert np.all(after < 0.9 * before)
        hues = stages(functools.partial(agreement, pipe))
        print("  hues before {}, after {}, at the end {}".format(*hues.round(3)))
        print(f"  forgotten: {(hues[1] - hues[2])[:3].mean():.3f}")
    assert forgotten["clora"] < 0.7 * forgotten["plain"]
