"""Whole runs of train.py's loop on tiny models: they resume bit for bit, and stop rather than go wrong."""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run
from tensorboardX.proto.event_pb2 import Event
from torch_reference import drawn

import train
from sdjax.core.errors import UserError, run_or_exit
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.make import make_task
from sdjax.training.limits import check_limits
from sdjax.training.optim import make_optimizer
from sdjax.training.step import init_state
from sdjax.training.task import split_frozen

ROOT = Path(train.__file__).parent


def state_of(workdir: Path, step: int) -> dict:
    """Everything in a checkpoint's state, as NumPy arrays."""
    restored = ocp.StandardCheckpointer().restore((workdir / "checkpoints" / str(step) / "state").absolute())
    return jax.tree.map(np.asarray, restored)


def assert_same_bits(a: dict, b: dict) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@pytest.fixture(scope="module")
def first_stage(make_config, tmp_path_factory) -> Path:
    """An autoencoder, drawn at random."""
    task, folder = make_task(make_config("autoencoder_tiny"), make_mesh({"data": -1})), tmp_path_factory.mktemp("stage")
    task.export(drawn(jax.eval_shape(task.init, jax.random.key(0))), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def whole(make_config, first_stage, tmp_path_factory) -> Path:
    """The workdir of 4 steps over the first stage."""
    config, workdir = make_config("tiny", 4), tmp_path_factory.mktemp("whole") / "run"
    config.task.first_stage = str(first_stage)
    train.train_and_evaluate(config, workdir)
    return workdir


@pytest.mark.slow
def test_two_halves_are_the_whole(make_config, first_stage, whole, tmp_path):
    """From its checkpoint of step 2 a run comes to the state of step 4, to the bit: parameters, average, optimiser,
    order of the data, all noise."""
    halves = tmp_path / "halves"
    shutil.copytree(whole, halves, ignore=shutil.ignore_patterns("export", "4"))
    config = make_config("tiny", 4)
    config.task.first_stage = str(first_stage)
    folder = train.train_and_evaluate(config, halves)
    assert (folder / "model_index.json").is_file()
    assert state_of(whole, 4)["step"] == 4
    assert_same_bits(state_of(whole, 4), state_of(halves, 4))
    position = [json.loads((workdir / "checkpoints/4/data/metadata").read_text()) for workdir in (whole, halves)]
    assert position[0] == position[1]
    assert position[0]["step"] == 4


@pytest.mark.slow
def test_a_run_begins_from_a_given_model(make_config, first_stage, whole):
    """With task.initial the first state is that model's: what was exported in float16, the average like the rest."""
    config = make_config("tiny", 2)
    config.task.first_stage, config.task.initial = str(first_stage), str(whole / "export")
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh)
    _, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
    state = init_state(task, make_optimizer(config.optim, 2), config.train.seed, mesh, initial)
    before = state_of(whole, 4)
    for found in (state.params, state.ema):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.float32(np.float16(y))), found, before["ema"])
    config.model.unet.channels = (32, 96)
    with pytest.raises(UserError, match=r"task\.initial"):
        make_task(config, mesh).pretrained(sharded_put(mesh))


@pytest.fixture
def two_layers(monkeypatch):
    """train.py with tiny_run.py's network: what stops a run does not depend on the system."""
    monkeypatch.setattr(train, "make_task", tiny_run.make_task)


def test_two_halves_of_two_layers_are_the_whole(make_config, two_layers, tmp_path):
    """2 + 2 steps leave the state of 4, to the bit: parameters, average, optimiser, order of the data, all noise."""
    train.train_and_evaluate(make_config("autoencoder_tiny", 4), tmp_path / "whole")
    for steps in (2, 4):
        train.train_and_evaluate(make_config("autoencoder_tiny", steps), tmp_path / "halves")
    whole, halves = (state_of(tmp_path / name, 4) for name in ("whole", "halves"))
    assert whole["step"] == 4
    assert_same_bits(whole, halves)
    position = [
        json.loads((tmp_path / name / "checkpoints/4/data/metadata").read_text()) for name in ("whole", "halves")
    ]
    assert position[0] == position[1]


def test_a_checkpoint_that_cannot_be_read_stops_the_run(make_config, two_layers, tmp_path):
    train.train_and_evaluate(make_config("autoencoder_tiny", 2), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/2/state/d")
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    with pytest.raises(UserError, match=r"cannot restore .*checkpoints/2: ."):
        train.train_and_evaluate(make_config("autoencoder_tiny", 4), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == before


def test_a_workdir_of_another_config_is_refused(make_config, two_layers, tmp_path):
    train.train_and_evaluate(make_config("autoencoder_tiny", 2), tmp_path / "run")
    config = make_config("autoencoder_tiny", 4)
    config.optim.learning_rate = 0.5
    with pytest.raises(UserError, match=r"belongs to another config: optim.learning_rate is 0.03 there and 0.5 here"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/4").exists()


def kept(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


@pytest.mark.parametrize("rate", [1e38, 3e38])
def test_ruined_parameters_are_not_kept(rate, make_config, two_layers, tmp_path):
    """Step 2 moves every parameter by the rate: its checkpoint gave the loss of step 3, or was never written."""
    config = make_config("autoencoder_tiny", 4)
    config.optim.update(name="adamw", learning_rate=rate, warmup_steps=1)
    config.train.update(checkpoint_every=1, keep_checkpoints=1)
    with pytest.raises(UserError, match=r"step [23]\b.*; the checkpoint of step 1 is intact") as error:
        train.train_and_evaluate(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    before = kept(tmp_path / "run")
    assert {name for name in before if name.isdigit()} == {"1"}
    config.train.steps = 1  # it can be restored
    train.train_and_evaluate(config, tmp_path / "run")
    assert kept(tmp_path / "run") == before


def scalars(workdir: Path, name: str) -> dict[int, float]:
    """Of TensorBoard's files: TFRecords, each of a length, its check, an event, its check."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        raw = path.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + size])
            found.update((event.step, value.simple_value) for value in event.summary.value if value.tag == name)
            raw = raw[16 + size :]
    return found


def test_another_number_of_steps_is_another_schedule(make_config, two_layers, caplog, tmp_path):
    """A cosine from 2 steps ends at 0; resumed to 4 it has another value at step 3, which the log says. The rates are
    among the metrics, each as the step used it."""
    for steps in (2, 4):
        config = make_config("autoencoder_tiny", steps)
        config.optim.update(schedule="cosine", warmup_steps=0, learning_rate=0.01)
        config.optim.components = {"net": {"learning_rate": 0.02}}
        train.train_and_evaluate(config, tmp_path)
    rates = [0.01, 0.005, 0.005, 0.01 * (1 + math.cos(0.75 * math.pi)) / 2]
    assert scalars(tmp_path, "train/learning_rate") == pytest.approx(dict(enumerate(rates, 1)), rel=1e-5)
    doubled = {step: 2 * rate for step, rate in enumerate(rates, 1)}
    assert scalars(tmp_path, "train/learning_rate_net") == pytest.approx(doubled, rel=1e-5)
    said = [message for message in caplog.messages if "config.train.steps was 2 and is 4" in message]
    assert len(said) == 2
    assert "the learning rate of the next step is 0.005, and would have been 0" in said[0]


def test_data_that_is_not_finite_is_named(make_config, two_layers, monkeypatch, tmp_path):
    """The parameters are not to blame: the checkpoint before remains what a run goes on from."""
    monkeypatch.setattr(tiny_run, "NAN", 3)
    config = make_config("autoencoder_tiny", 4)
    config.train.checkpoint_every = 2
    message = r"the loss is nan at step 4, whose batch is not finite in x; the checkpoint of step 2 is intact"
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert kept(tmp_path / "run") == {"2"}


BAD = {
    "key": (["--config.optim.learning_rat=1"], "learning_rat"),
    "section": (["--config.optimizer.b1=1"], "optimizer"),
    "value": (["--config.train.steps=many"], "many"),
    "mesh": (["--config.mesh.data=3"], "does not cover the 1 devices"),
    "batch": (["--config.train.batch_size=0"], "config.train.batch_size=0 must be at least 1"),
    "parts": (["--config.train.accumulate=3"], "config.train.accumulate=3 does not divide config.train.batch_size=8"),
    "no part": (["--config.train.accumulate=0"], "config.train.accumulate=0 must be at least 1"),
    "no step": (["--config.train.steps=0"], "config.train.steps=0 must be at least 1"),
    "kept": (["--config.train.keep_checkpoints=0"], "keep_checkpoints=0 must be at least 1 (to retain all, a large"),
    "all kept": (["--config.train.keep_checkpoints=-1"], "config.train.keep_checkpoints=-1 must be at least 1"),
    "checkpoints": (["--config.train.checkpoint_every=-5"], "checkpoint_every=-5 must be at least 0 (0: never)"),
    "threads": (["--config.data.threads=0"], "config.data.threads=0 must be at least 1"),
    "rate": (["--config.optim.learning_rate=nan"], "config.optim.learning_rate=nan must be at least 0"),
    "average": (["--config.optim.ema_decay=1.0"], "config.optim.ema_decay=1.0 must be at least 0 and below 1"),
    "clipping": (["--config.optim.clip_norm=0.0"], "config.optim.clip_norm=0.0 must be more than 0"),
    "seed": (["--config.train.seed=-1"], "config.train.seed=-1 must be at least 0"),
    "source": (["--config.data.source=imagenet"], "unknown data source 'imagenet' in config.data.source; choose one"),
    "crop": (["--config.task.crop=17"], "multiples of 2"),
    "reconstruction": (["--config.task.reconstruction=l3"], "unknown reconstruction loss 'l3'"),
    "optimizer": (["--config.optim.name=sgd"], "unknown optimizer 'sgd'"),
    "dtype": (["--config.train.dtype=fp8"], "unknown dtype 'fp8'"),
    "restore": (["--config.train.restore=first"], "unknown choice 'first' in config.train.restore; choose one of"),
    "profile": (["--config.train.profile=3"], "config.train.profile='3' is not START:STOP"),
    "processes": (["--processes=2"], "--processes without --coordinator, --process_id: the three go together"),
    "process": (["--processes=two"], "two"),
    "timeout": (["--coordinator_timeout=0"], "coordinator_timeout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    flags, message = BAD[case]
    config = "--config=configs/openmoji.py:autoencoder_tiny"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", config, f"--workdir={tmp_path / 'run'}", *flags])
    with pytest.raises(SystemExit) as exit_:
        run_or_exit(train.main)
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_numbers_of_python_configs_have_types(make_config):
    """The command line checks types; a config file may say 1e5, or True, or change one network's settings."""
    for section, key, value in (("train", "steps", 1e5), ("train", "batch_size", True), ("optim", "eps", "tiny")):
        config = make_config("autoencoder_tiny")
        with config.ignore_type():
            config[section][key] = value
        with pytest.raises(UserError, match=rf"config\.{section}\.{key}={value!r} is not an? (integer|number)"):
            check_limits(config)
    config = make_config("autoencoder_tiny")
    config.optim.components = {"vae": {"learning_rate": -1.0}}
    with pytest.raises(UserError, match=r"config\.optim\.components\.vae\.learning_rate=-1\.0 must be at least 0"):
        check_limits(config)


def test_zero_is_never(make_config, two_layers, tmp_path):
    """No previews, no lines, no checkpoint but the last."""
    config = make_config("autoencoder_tiny", 3)
    config.train.update(checkpoint_every=0, sample_every=0, log_every=0)
    train.train_and_evaluate(config, tmp_path / "run")
    assert kept(tmp_path / "run") == {"3"}
    assert not (tmp_path / "run/samples").exists()


def test_check_data_reports_every_bad_row(pictures, tmp_path, monkeypatch, capsys):
    """Exit code 2 and a line for each of two broken images; 0 for a sound folder; no workdir is asked for."""
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    for name in ("3.png", "7.png"):
        (broken / name).write_bytes((broken / name).read_bytes()[:60])
    monkeypatch.chdir(ROOT)
    for folder, code in ((broken, 2), (pictures, 0)):
        flags = ["--config=configs/openmoji.py:autoencoder_tiny", f"--config.data.source=folder:{folder}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--check_data"])
        with pytest.raises(SystemExit) as exit_:
            run_or_exit(train.main)
        assert exit_.value.code == code
        told = capsys.readouterr().out
        assert ("3.png" in told, "7.png" in told, "4.png" in told) == (code == 2, code == 2, False)


def test_an_unreadable_picture_is_named(make_config, pictures, tmp_path):
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    (broken / "3.png").write_bytes((broken / "3.png").read_bytes()[:60])
    config = make_config("autoencoder_tiny")
    config.data.source, config.train.batch_size = f"folder:{broken}", 16  # it is in the first batch
    with pytest.raises(UserError, match=r"3\.png"):
        train.train_and_evaluate(config, tmp_path / "run")
