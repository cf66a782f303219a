"""The data of a run: the same for all its processes, and the same where it was moved to."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

import train
from sdjax.core.errors import UserError
from sdjax.data.identity import identity_of
from sdjax.data.sources.open import source
from sdjax.parallel import distributed
from sdjax.tasks.base import data_identity


@pytest.fixture
def two_layers(monkeypatch):
    """train.py with tiny_run.py's network over the identity of the data that the config names."""

    def make(config, mesh):
        return tiny_run.make_task(config, mesh)._replace(identity=lambda: data_identity(config))

    monkeypatch.setattr(train, "make_task", make)


def copy_of(pictures: Path, folder: Path, change: str = "") -> Path:
    shutil.copytree(pictures, folder)
    if change == "fewer":
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        (folder / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    elif change == "larger":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "3.png")
    elif change == "renamed":
        (folder / "3.png").rename(folder / "three.png")
        text = (folder / "metadata.jsonl").read_text().replace('"3.png"', '"three.png"')
        (folder / "metadata.jsonl").write_text(text)
    elif change == "unreadable":
        (folder / "3.png").write_bytes(b"")
    return folder


def test_the_identity_is_that_of_names_sizes_and_count(pictures, tmp_path):
    changes = ("fewer", "larger", "renamed", "unreadable")
    folders = [copy_of(pictures, tmp_path / change, change) for change in changes]
    kinds = [identity_of(source(f"folder:{folder}")) for folder in folders]
    whole = identity_of(source(f"folder:{pictures}"))
    assert whole["examples"] == 16
    assert whole == identity_of(source(f"folder:{copy_of(pictures, tmp_path / 'other')}"))
    assert len({json.dumps(found) for found in (whole, *kinds)}) == 5


def test_the_same_images_elsewhere_go_on(make_config, two_layers, pictures, caplog, tmp_path):
    def go(folder: Path, steps: int):
        config = make_config("autoencoder_tiny", steps)
        config.data.source = f"folder:{folder}"
        return train.train_and_evaluate(config, tmp_path / "run")

    go(pictures, 2)
    copy = copy_of(pictures, tmp_path / "copy")
    with caplog.at_level(logging.INFO, "sdjax"):
        go(copy, 3)
    assert f"data.source is 'folder:{pictures}' there and 'folder:{copy}' here: the same data" in caplog.text
    fewer = copy_of(pictures, tmp_path / "fewer", "fewer")
    message = (
        rf"run belongs to other data: data\.source is .* and 'folder:{fewer}' here, and examples were 16 and are 15; "
    )
    with pytest.raises(UserError, match=message):
        go(fewer, 4)
    (tmp_path / "run/data.json").unlink()  # a run of an earlier version, whose data nobody recorded
    with pytest.raises(UserError, match=r"belongs to another config: data\.source is"):
        go(copy, 4)
    go(pictures, 4)
    caplog.clear()
    go(copy, 5)


def test_processes_with_other_data_are_refused(make_config, two_layers, monkeypatch, tmp_path):
    """Before anything is computed, by the process whose data differs from the first one's."""

    def other(text: str) -> str:
        return text.replace('"examples": 16', '"examples": 15')

    def must_not_be_called(*args):
        raise AssertionError

    monkeypatch.setattr(distributed, "agreed", other)
    monkeypatch.setattr(train, "init_state", must_not_be_called)
    with pytest.raises(
        UserError, match=r"the data of process 0: \{\"examples\": 16.*; of process 0: .* 15.*; they must"
    ):
        train.train_and_evaluate(make_config("autoencoder_tiny"), tmp_path / "run")
