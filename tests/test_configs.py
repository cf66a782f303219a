"""Configs say what their scripts understand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from configs import openmoji, stable_diffusion
from sdjax.convert.opening import ID
from sdjax.tasks.base import reading_of

ROOT = Path(__file__).parents[1]


def script():
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", stable_diffusion.MODELS)
def test_published_models_are_ids_of_the_hub(name):
    config = stable_diffusion.get_config(name)
    sample = script()
    assert set(config.sample) <= {*sample.CALL, *sample.SOURCES, "dtype"}
    assert all(ID.fullmatch(config.sample[source]) for source in ("checkpoint", "refiner") if source in config.sample)


def test_a_config_takes_no_key_that_nobody_reads():
    for config in (openmoji.get_config(), openmoji.get_config("autoencoder"), stable_diffusion.get_config()):
        with pytest.raises((AttributeError, KeyError)):
            config.sample.stepz = 3


TRAINING = ("autoencoders", "classifiers", "ldm", "openmoji", "openmoji_ldm", "pixels", "stable_diffusion_training")


@pytest.mark.parametrize("name", TRAINING)
def test_every_training_says_how_its_data_are_read(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert reading_of(config).threads >= 1
    assert config.data.crop in ("centre", "adm", "random")
