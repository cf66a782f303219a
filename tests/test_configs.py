"""Configs say what their scripts understand."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import train
from configs import autoencoders, ldm, openmoji, pixels, stable_diffusion
from sdjax.checkpoints.families import FAMILIES
from sdjax.checkpoints.open import ID
from sdjax.tasks.base import loader_options

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
    assert set(config.sample) <= {*sample.FLAGS, *sample.SOURCES, "dtype"}
    assert all(ID.fullmatch(config.sample[source]) for source in ("checkpoint", "refiner") if source in config.sample)


FACTS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() & (ldm.RECIPES.keys() | pixels.VARIANTS.keys())))
def test_configs_and_families_have_the_same_facts(name):
    """The noise schedule, the size of images and the guidance scale that was published."""
    config, family = (ldm if name in ldm.RECIPES else pixels).get_config(name), FAMILIES[name]
    scheduler = config.task.scheduler.to_dict()
    assert {key: scheduler[key] for key in FACTS} == {key: family.scheduler[key] for key in FACTS}
    assert config.data.size == family.size
    assert config.sample.get("guidance_scale", 1.0) == family.settings.get("guidance_scale", 1.0)


TRAINING = ("autoencoders", "classifiers", "ldm", "openmoji", "openmoji_ldm", "pixels", "stable_diffusion_training")


def names_in_code() -> set[str]:
    """What sdjax and the scripts have as an attribute, a string, an argument or a field."""
    found: set[str] = set()
    for path in (*(ROOT / "sdjax").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                    found.add(name)
                case ast.Constant(value=str(name)) | ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(name)
    return found


def keys_of(config: ConfigDict) -> set[str]:
    """Of all sections."""
    inner = [keys_of(value) for value in config.values() if isinstance(value, ConfigDict)]
    return set(config.keys()).union(*inner)


def test_a_config_takes_no_key_that_nobody_reads():
    """A key is refused that the config has not; and each that it has is named in the code, where an invented one is
    not."""
    read = names_in_code()
    modules = [importlib.import_module(f"configs.{name}") for name in (*TRAINING, "stable_diffusion")]
    configs = [module.get_config() for module in modules] + [openmoji.get_config("autoencoder")]
    for config in configs:
        assert keys_of(config) <= read
        with pytest.raises((AttributeError, KeyError)):
            config.train.stepz = 3
        with config.unlocked():
            config.train.stepz = 3
        assert keys_of(config) - read == {"stepz"}


@pytest.mark.parametrize("name", TRAINING)
def test_every_training_says_how_its_data_are_read(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert loader_options(config).threads >= 1
    assert config.data.crop in ("centre", "adm", "random")


def test_a_first_stage_keeps_its_own_config(monkeypatch):
    """Changes of the second's keys are none of its, but it sees the second's data where it names none."""
    changes = ["--config.model.class_embedder.classes=10", "--config.train.steps=3"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=configs/ldm.py:cin256_tiny", *changes])
    second = ldm.get_config("cin256_tiny")
    second.data.source = "folder:somewhere"
    wanted = autoencoders.get_config("vq_f4_tiny")
    wanted.data.source = "folder:somewhere"
    assert train.first_stage(second.task.first_stage, second).to_dict() == wanted.to_dict()
    assert train.first_stage("configs/openmoji.py:autoencoder", second).data.source == "openmoji"
