"""A trace of the steps that were asked for, and the share of time that went into waiting for data."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import tiny_run
from tensorboardX.proto.event_pb2 import Event

import train
from sdjax.core.errors import UserError
from sdjax.training.profile import parse_steps


@pytest.fixture
def tiny(make_config, monkeypatch):
    """tiny(steps, **train): a config of tiny_run's network, whose task takes the place of the config's."""

    def make(steps: int, **options):
        config = make_config("autoencoder_tiny", steps)
        config.optim.update(name="adamw", learning_rate=0.01)
        config.train.update(sample_every=1000, checkpoint_every=1000, **options)
        return config

    monkeypatch.setattr(train, "make_task", tiny_run.make_task)
    return make


def scalars(workdir) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: {name: {step: value}} of all event files (TFRecord: length, crc, data, crc)."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 8], "little")
            event = Event.FromString(raw[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_the_trace_holds_the_steps_that_were_asked_for(tiny, tmp_path):
    train.train_and_evaluate(tiny(6, profile="3:4"), tmp_path)
    (path,) = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if re.fullmatch(r"train( \d+)?", e.get("name", ""))}
    assert steps == {"3", "4"}
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_a_trace_that_is_written_wrongly_is_one_line():
    assert parse_steps("", 5) == range(0)
    assert parse_steps("2:9", 5) == range(2, 6)
    for text in ("5", "a:b", "1:2:3", "-1:2", "1.5:2", ":"):
        with pytest.raises(UserError, match=r"config.train.profile=.* is not START:STOP"):
            parse_steps(text, 5)
    for text in ("0:2", "3:2"):
        with pytest.raises(UserError, match=r"the first step is 1, and STOP is not before START"):
            parse_steps(text, 5)
    with pytest.raises(UserError, match=r"the run ends at step 5"):
        parse_steps("6:7", 5)


def test_waiting_for_data_is_told_from_computing(tiny, tmp_path, monkeypatch):
    """With 50 ms for each batch most of a step is waiting; the rate is that of the batches."""
    monkeypatch.setattr(tiny_run, "PAUSE", 0.2)
    train.train_and_evaluate(tiny(8, batch_size=8), tmp_path)
    shown = scalars(tmp_path)
    assert set(shown) >= {"train/loss", "train/twice", "train/grad_norm", "train/images_per_second"}
    assert set(shown["train/data_wait_share"]) == set(range(2, 9)), "the first step is that of compilation"
    later = [shown["train/data_wait_share"][step] for step in range(4, 8)]
    assert 0.3 < sum(later) / len(later) <= 1.0
    rates = [shown["train/images_per_second"][step] for step in range(4, 8)]
    assert sum(rates) / len(rates) < 8 / 0.2 * 1.6
    monkeypatch.setattr(tiny_run, "PAUSE", 0.0)
    train.train_and_evaluate(tiny(8, log_every=8), tmp_path / "fast")
    assert scalars(tmp_path / "fast")["train/data_wait_share"][8] < sum(later) / len(later)


def test_the_best_by_a_metric_of_the_task(tiny, tmp_path):
    """The loss falls, so that the best are the newest; by a metric that is none the run says which there are."""
    config = tiny(8, keep_best="twice")
    config.train.checkpoint_every = 2
    train.train_and_evaluate(config, tmp_path)
    metrics = json.loads((tmp_path / "checkpoints/8/metadata/metadata").read_text())["metrics"]
    shown = scalars(tmp_path)
    mean = sum(shown["train/twice"][step] for step in (7, 8)) / 2
    assert metrics["twice"] == pytest.approx(mean, rel=1e-6) == pytest.approx(2 * metrics["loss"], rel=1e-6)
    with pytest.raises(UserError, match=r"unknown metric 'psnr' in config.train.keep_best; choose one of: .*loss"):
        train.train_and_evaluate(tiny(9, keep_best="psnr"), tmp_path)
