"""A workdir that is no local folder: what goes through etils.epath, and what is said where it cannot be."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from etils import epath
from etils.epath import gpath

import train
from sdjax.core.errors import UserError
from sdjax.training.export import exported, local_folder, write_export
from sdjax.training.tensorboard import check_tensorboard
from sdjax.training.workdir import check_owner, claim, is_remote, open_workdir


def test_owner_and_export_in_a_bucket(bucket, tmp_path):
    assert is_remote(bucket)
    claim(bucket, {"optim": {"rate": 1}}, {})
    assert json.loads((bucket / "config.json").read_text()) == {"optim": {"rate": 1}}
    with pytest.raises(UserError, match=r"gs://bucket/run belongs to another config: optim.rate is 1 there"):
        check_owner(bucket, {"optim": {"rate": 2}}, ())
    mesh = jax.make_mesh((1,), ("data",))

    def write(params, folder: Path):
        (folder / "net").mkdir(parents=True)
        np.save(folder / "net" / "a.npy", params["a"])

    assert not exported(bucket, 3)
    write_export(write, {"a": np.arange(3)}, bucket, 3, mesh)
    assert exported(bucket, 3)
    assert not exported(bucket, 4)
    copy = Path(local_folder(str(bucket / "export")))
    np.testing.assert_array_equal(np.load(copy / "net" / "a.npy"), np.arange(3))
    assert sorted(path.name for path in Path(local_folder(str(bucket))).iterdir()) == ["net"]  # a workdir's export
    assert local_folder(str(tmp_path)) == str(tmp_path)


def test_what_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(gpath, "_PREFIX_TO_BACKEND", dict(gpath._PREFIX_TO_BACKEND))

    def missing(self):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(gpath.PosixGPath, "exists", missing)
    with pytest.raises(UserError, match=r"cannot open the workdir gs://b/run: .*pip install gcsfs google-cloud"):
        open_workdir("gs://b/run")
    with pytest.raises(UserError, match=r"TensorBoard files are written to a local folder, gs:// or s3:// only"):
        check_tensorboard(epath.Path("az://b/run"))


def test_an_export_that_was_cut_short_is_made_again(make_config, monkeypatch, tmp_path):
    """It is written under another name; one of an earlier step does not stand for a later one."""
    monkeypatch.setattr(train, "make_task", tiny_run.make_task)

    def config(steps):
        made = make_config("autoencoder_tiny", steps)
        made.optim.update(name="adamw", learning_rate=0.01)
        return made

    def cut(task):
        def export(params, folder):
            task.export(params, folder)
            raise KeyboardInterrupt

        return task._replace(export=export)

    train.train_and_evaluate(config(2), tmp_path)
    first = (tmp_path / "export/net.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_task", lambda *args: cut(tiny_run.make_task(*args)))
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config(4), tmp_path)
    assert (tmp_path / "export/net.safetensors").read_bytes() == first
    train.train_and_evaluate(config(4), tmp_path)
    train.train_and_evaluate(config(4), tmp_path / "quiet")
    again = (tmp_path / "export/net.safetensors").read_bytes()
    assert again == (tmp_path / "quiet/export/net.safetensors").read_bytes() != first
    assert not (tmp_path / "export.tmp").exists()


def test_old_workdirs_resume_with_new_keys(tmp_path):
    """Such a run goes on with the default, and is refused with another value."""
    claim(epath.Path(tmp_path), {"data": {"source": "a"}}, {})
    check_owner(epath.Path(tmp_path), {"data": {"source": "a", "crop": "centre", "crop_sides": (1.0, 1.0)}}, ())
    check_owner(epath.Path(tmp_path), {"data": {"source": "a"}}, ())
    with pytest.raises(UserError, match=r"data.crop is 'centre' there and 'random' here"):
        check_owner(epath.Path(tmp_path), {"data": {"source": "a", "crop": "random"}}, ())


@pytest.mark.parametrize(("task", "now"), [("class_conditional", "diffusion"), ("noisy_classifier", "classifier")])
def test_a_run_of_the_first_version_is_refused(task, now, tmp_path):
    """Its tasks had other names and other settings; first stages are what they were."""
    workdir = epath.Path(tmp_path)
    claim(workdir, {"task": {"name": task, "caption_dropout": 0.1}}, {})
    message = rf"{tmp_path} was begun by an earlier version, whose task '{task}' this one calls '{now}', .* sdjax 0\.1"
    with pytest.raises(UserError, match=message):
        check_owner(workdir, {"task": {"name": now, "dropout": 0.1}}, ())
    (workdir / "config.json").write_text('{"task": {"name": "autoencoder"}, "train": {}}')
    check_owner(workdir, {"task": {"name": "autoencoder"}, "train": {"trainable": ()}}, ())


def test_a_damaged_record_of_the_export_is_no_record(tmp_path):
    (tmp_path / "export").mkdir()
    for text, is_whole in (('{"step": 3}', True), ('{"step"', False), ("[3]", False), ("\x00\x00", False)):
        (tmp_path / "export.json").write_text(text)
        assert exported(epath.Path(tmp_path), 3) == is_whole


def test_what_a_killed_run_had_not_finished_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "samples").mkdir()
    partial = f"{{}}.{ended.pid}@{socket.gethostname()}.partial"
    for name in (".config.json", "samples/.samples_0000050.png"):
        (tmp_path / partial.format(name)).write_text("{")
    (tmp_path / "samples/samples_0000050.png").write_text("whole")
    claim(epath.Path(tmp_path), {"task": {"name": "a"}}, {"examples": 3})
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"config.json", "data.json", "samples", "samples/samples_0000050.png"}


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00" * 9, None])
def test_a_damaged_config_is_that_of_the_newest_checkpoint(text, tmp_path, caplog):
    """It is left aside and written anew; without a checkpoint that knows it, nobody can say whose the folder is."""
    workdir, config = epath.Path(tmp_path), {"optim": {"rate": 1}}
    claim(workdir, config, {"examples": 3})
    for name, found in (("config.json", text), ("data.json", text)):
        (tmp_path / name).unlink()
        if found is not None:
            (tmp_path / name).write_text(found)
    check_owner(workdir, {"optim": {"rate": 2}}, ())  # without checkpoints it is as good as new
    for step, rate in ((2, 0), (10, 1)):
        (tmp_path / f"checkpoints/{step}/metadata").mkdir(parents=True)
        notes = json.dumps({"config": {"optim": {"rate": rate}}})
        (tmp_path / f"checkpoints/{step}/metadata/metadata").write_text(notes)
    with pytest.raises(UserError, match=r"belongs to another config: optim.rate is 1 there and 2 here"):
        check_owner(workdir, {"optim": {"rate": 2}}, ())
    check_owner(workdir, config, ())
    claim(workdir, config, {"examples": 3})
    assert json.loads((tmp_path / "config.json").read_text()) == config
    left = {path.name: path.read_text() for path in tmp_path.glob("*.corrupt")}
    assert left == ({} if text is None else {"config.json.corrupt": text, "data.json.corrupt": text})
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints/10/metadata/metadata").write_text("{")
    with pytest.raises(UserError, match=r"has checkpoints but no config.json that says whose they are"):
        check_owner(workdir, config, ())
