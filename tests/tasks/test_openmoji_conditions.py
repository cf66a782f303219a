"""Every condition on OpenMoji, trained by the published commands: minutes to an hour each on two CPU cores."""

from __future__ import annotations

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
import train
from configs import autoencoders, classifiers, openmoji_ldm, pixels
from sdjax.convert.folder import read_component
from sdjax.core.prng import image_keys
from sdjax.data import sources, transforms
from sdjax.data.degradation import bicubic
from sdjax.data.masks import RandomMask
from sdjax.data.openmoji_parts import GROUPS, SHAPES
from sdjax.diffusion.samplers import SamplerOptions, make_table, schedule_of
from sdjax.eval.bits import bits
from sdjax.eval.similarity import psnr
from sdjax.models.autoencoder import autoencoder_of
from sdjax.models.unet2d import UNet2D
from sdjax.tasks.autoencoder import reconstruct
from sdjax.tasks.noisy_classifier import classify, read_classifier
from sdjax.tasks.pixels import Guide, draw

pytestmark = pytest.mark.slow
RUNS = "sdjax_runs"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp(RUNS)


def held_out(side: int, name: str = "openmoji"):
    pictures = grain.MapDataset.source(sources.source(name, "held_out")).map(transforms.Square(side))
    return [pictures[i] for i in range(len(pictures))]


@pytest.fixture(scope="module")
def first_stage(root):
    return train.train_and_evaluate(autoencoders.get_config("openmoji_kl"), root / "kl")


@pytest.fixture(scope="module")
def classifier(root):
    return read_classifier(train.train_and_evaluate(classifiers.get_config("openmoji"), root / "classifier"))


@pytest.fixture(scope="module")
def pixel_model(root):
    return train.train_and_evaluate(pixels.get_config("openmoji"), root / "pixels")


@pytest.fixture
def trained(root, first_stage):
    """A variant of configs/openmoji_ldm.py, ready to be called."""

    def make(name: str):
        config = openmoji_ldm.get_config(name)
        config.task.first_stage = str(first_stage)
        return sdjax.load_conditional(train.train_and_evaluate(config, root / name))

    return make


def quality(folder) -> float:
    """Mean PSNR of the held-out pictures, in dB."""
    vae = read_component(folder / "vae", "vae")
    images = np.stack([row["image"] for row in held_out(64)])
    parts = [reconstruct(autoencoder_of(vae.config), vae.params, images[i : i + 30]) for i in range(0, len(images), 30)]
    return float(psnr(images / 255.0, np.concatenate(parts)).mean())


def test_a_kl_first_stage_passes_22_db(first_stage):
    assert quality(first_stage) > 22.0


def test_a_vq_first_stage_passes_22_db(root):
    assert quality(train.train_and_evaluate(autoencoders.get_config("openmoji_vq"), root / "vq")) > 22.0


def test_holes_are_filled_better_than_by_the_mean_colour(trained):
    """Less squared error in the hole than the mean of what is around it; all around it is the given picture."""
    pipe, rng = trained("inpainting"), np.random.default_rng(0)
    ours, plain = [], []
    for row in held_out(64)[:48]:
        image = row["image"]
        mask = RandomMask(0.05, 0.4).random_map(row, rng)["mask"][..., 0]
        made, hole = pipe(init_image=image, mask=mask * np.uint8(255))[0], mask > 0
        np.testing.assert_array_equal(np.round(made[~hole] * 255), image[~hole])
        ours.append(np.square(made - image / 255.0)[hole].mean())
        plain.append(np.square(image[~hole].mean(0) / 255.0 - image / 255.0)[hole].mean())
    assert np.mean(ours) < np.mean(plain)


def test_super_resolution_beats_bicubic(trained):
    pipe, ours, plain = trained("super_resolution"), [], []
    for row in held_out(128)[:32]:
        small = bicubic(row["image"], 4, np.random.default_rng(0))
        large = transforms.square(small, 128, transforms.Image.Resampling.BICUBIC)
        truth = row["image"][None] / 255.0
        ours.append(psnr(truth, pipe(init_image=small)))
        plain.append(psnr(truth, large[None] / 255.0))
    assert np.mean(ours) > np.mean(plain)


def test_a_layout_puts_the_colour_into_the_box(trained):
    """The mean colour of a box's middle is nearer to that of the asked shape than to any other colour's, in most."""
    pipe, right = trained("layout"), []
    wanted = {"red": (234, 90, 71), "yellow": (252, 234, 43), "green": (177, 204, 51), "purple": (137, 103, 170)}
    boxes = ([0.1, 0.1, 0.4, 0.4], [0.5, 0.4, 0.4, 0.4], [0.05, 0.55, 0.4, 0.4])
    for color in wanted:
        for box in boxes:
            image = pipe(layout=[{"class": SHAPES.index(f"{color} square"), "box": box}], seed=1)[0]
            x, y, w, h = (round(v * 64) for v in box)
            middle = 255 * image[y + h // 4 : y + 3 * h // 4, x + w // 4 : x + 3 * w // 4].mean((0, 1))
            distances = {name: np.abs(middle - value).sum() for name, value in wanted.items()}
            distances["white"] = np.abs(middle - 255).sum()
            right.append(min(distances, key=lambda name: distances[name]) == color)
    assert np.mean(right) > 0.6


def test_samples_of_a_class_are_taken_for_it(trained, classifier):
    """By a classifier of real pictures, three times as often as chance."""
    pipe, (model, params), right = trained("classes"), classifier, []
    for label in range(len(GROUPS)):
        images = pipe(class_label=label, num_images=16, guidance_scale=2.0)
        small = np.stack([transforms.square((image * 255).astype(np.uint8), 32) for image in images])
        right.append((classify(model, params, small).argmax(-1) == label).mean())
    assert np.mean(right) > 3.0 / len(GROUPS)


def test_guidance_makes_the_classifier_surer(pixel_model, classifier):
    """Monotonically over scales 0, 1 and 4."""
    model, judge = classifier
    unet = read_component(pixel_model / "unet", "unet")
    scheduler = pixels.get_config("openmoji").task.scheduler.to_dict()
    table = make_table("ddim", schedule_of(scheduler), 25, SamplerOptions.from_scheduler_config(scheduler, "ddim"))
    labels, keys, sure = np.arange(40) % len(GROUPS), image_keys(0, jnp.arange(40)), []
    for scale in (0.0, 1.0, 4.0):
        guide = Guide(model, judge, scale)
        images = draw(UNet2D(unet.config), unet.params, table, keys, 32, "epsilon", labels, guide)
        logits = jax.nn.log_softmax(classify(model, judge, (np.asarray(images) * 255).round().astype(np.uint8)))
        sure.append(float(np.exp(logits[np.arange(40), labels]).mean()))
    assert sure[0] < sure[1] < sure[2]


def test_a_learned_variance_costs_fewer_bits_in_50_steps(pixel_model):
    """iDDPM's claim, on held-out pictures."""
    found = bits(pixel_model, sources.source("openmoji", "held_out"), 50, 30)
    learned = found.pop("bits_per_dimension_learned_50")
    assert learned < min(found.values())
