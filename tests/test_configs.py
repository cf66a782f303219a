"""Configs say what their scripts understand."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from etils import epath
from ml_collections import ConfigDict

import train
from configs import autoencoders, ldm, openmoji, pixels, stable_diffusion
from sdjax.checkpoints.families import FAMILIES
from sdjax.checkpoints.open import ID
from sdjax.core.errors import UserError
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


TRAINING = (
    "autoencoders",
    "classifiers",
    "clip",
    "controlnet",
    "custom_diffusion",
    "dreambooth",
    "finetune",
    "ldm",
    "lora",
    "openmoji",
    "openmoji_ldm",
    "pixels",
    "stable_diffusion_training",
    "textual_inversion",
)


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


SECOND = "configs/ldm.py:cin256_tiny"
CHANGES = {"data.source": "folder:mine", "train.steps": 3, "model.class_embedder.classes": 10}
FLAGS = [f"--config={SECOND}", *(f"--config.{key}={value}" for key, value in CHANGES.items())]


def test_a_first_stage_takes_the_changes_whose_keys_it_has(monkeypatch, tmp_path, caplog):
    """Of a command line; one that is finished takes the data alone. What has no such change is its own config."""
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"--config={SECOND}", *(f"--config.{k}={v}" for k, v in CHANGES.items())]
    )
    second, workdir = ldm.get_config("cin256_tiny"), epath.Path(tmp_path)
    second.data.source = "folder:somewhere"
    wanted = autoencoders.get_config("vq_f4_tiny")
    for changes, source, steps in (({}, "folder:somewhere", 4), (CHANGES, "folder:mine", 3)):
        wanted.data.source, wanted.train.steps = source, steps
        with caplog.at_level("INFO", "sdjax"):
            assert train.first_stage(second.task.first_stage, second, workdir, changes).to_dict() == wanted.to_dict()
    assert f"the first stage, {second.task.first_stage}, takes data.source, train.steps from" in caplog.text
    assert train.first_stage("configs/openmoji.py:autoencoder", second, workdir, {}).data.source == "openmoji"
    (tmp_path / "export").mkdir()
    (tmp_path / "export.json").write_text('{"step": 4}')
    wanted.train.steps = 4
    assert train.first_stage(second.task.first_stage, second, workdir, CHANGES).to_dict() == wanted.to_dict()


def test_a_change_that_both_stages_cannot_share_is_refused(tmp_path):
    second, changes = ldm.get_config("cin256_tiny"), {"optim.learning_rate": 1e-3, "train.steps": 3}
    with pytest.raises(UserError, match=r"^--config\.optim\.learning_rate: the first stage has this key, too, [^\n]*$"):
        train.first_stage(second.task.first_stage, second, epath.Path(tmp_path), changes)


def test_a_command_line_hands_its_changes_to_the_run(monkeypatch, tmp_path):
    given = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "train_and_evaluate", lambda config, workdir, line: given.append(line))
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, f"--workdir={tmp_path}"])
    train.main()
    assert given == [train.CommandLine(SECOND, CHANGES)]
