"""Several processes train what one trains, stop together at one step, and fail together."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from children import free_port
from launching import corrupt, finish, run, start, start_together, state_of, steps, wait_until
from safetensors.numpy import load_file

# A sum over four devices is in another order on each mesh; 8 steps of Adam amplify the last bit to this.
TOLERANCE = 2e-5
EIGHT, FOUR = "--config.train.steps=8", "--config.train.steps=4"


def assert_close(a, b, tolerance: float = TOLERANCE) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


def assert_same_bits(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def test_two_processes_equal_one_and_resume_each_other(tmp_path):
    """8 steps of 1 x 4 devices, of 2 x 2, and of 4 + 4 in both orders, agree to 2e-5; the same mesh to the bit."""
    run(start(tmp_path / "one", EIGHT, devices=4))
    one = state_of(tmp_path / "one", 8)
    run(start(tmp_path / "mixed", FOUR, devices=4))
    run(*start_together(2, tmp_path / "mixed", EIGHT, devices=2))
    assert_close(state_of(tmp_path / "mixed", 8), one)
    position = json.loads((tmp_path / "mixed/checkpoints/8/data/metadata").read_text())
    assert position == json.loads((tmp_path / "one/checkpoints/8/data/metadata").read_text())
    exported = load_file(tmp_path / "mixed/export/net.safetensors")
    ema = state_of(tmp_path / "mixed", 8)["ema"]["net"]
    np.testing.assert_array_equal(exported["net.b.bias"], ema["b"]["bias"])
    np.testing.assert_array_equal(exported["net.a.kernel"], ema["a"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_write_what_one_restores(tmp_path, count):
    fsdp = ["--config.mesh.fsdp=2", "--config.mesh.data=-1"]
    run(start(tmp_path / "one", EIGHT, devices=4))
    run(*start_together(count, tmp_path / "parts", FOUR, *fsdp, devices=4 // count))
    run(start(tmp_path / "parts", EIGHT, devices=1))
    assert_close(state_of(tmp_path / "parts", 8), state_of(tmp_path / "one", 8))


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_losses(tmp_path):
    """1 device -> 4, and fsdp 2 -> data 4, agree with one undisturbed device to 2e-5; 1 -> 1 to the bit."""
    run(start(tmp_path / "whole", EIGHT))
    whole = state_of(tmp_path / "whole", 8)
    for name, before, after in (("same", 1, 1), ("more", 1, 4), ("fsdp", 2, 4)):
        split = ["--config.mesh.fsdp=2", "--config.mesh.data=1"] if name == "fsdp" else []
        run(start(tmp_path / name, FOUR, *split, devices=before))
        run(start(tmp_path / name, EIGHT, devices=after))
        (assert_same_bits if name == "same" else assert_close)(state_of(tmp_path / name, 8), whole)


def children_of(pid: int) -> list[int]:
    """Those that any of its threads has started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for found in lists for child in found.read_text().split()]


def is_running(pid: int) -> bool:
    """And not merely unburied."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except FileNotFoundError:
        return False


def test_signal_to_all_lets_loader_workers_finish(tmp_path):
    """As SLURM sends it: the run stops with a checkpoint and code 0, and none of its children is left."""
    flags = ["--config.data.workers=2", "--config.train.steps=100000", "--config.train.checkpoint_every=20"]
    process = start(tmp_path / "run", *flags, TINY_PAUSE="0.05")
    assert wait_until(lambda: steps(tmp_path / "run"), process)
    children = children_of(process.pid)
    assert len(children) >= 2
    for pid in (*children, process.pid):
        os.kill(pid, signal.SIGTERM)
    ((code, errors),) = finish(process)
    assert code == 0, errors
    assert steps(tmp_path / "run")[-1] > 20
    deadline = time.monotonic() + 30.0
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)


def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path):
    """SIGUSR1, which becomes SIGTERM: both exit with 0, one checkpoint more is there, and the files have one writer."""
    flags = ["--config.train.steps=100000", "--config.train.checkpoint_every=100000"]
    pair = start_together(2, tmp_path / "run", *flags, devices=1, TINY_PAUSE="0.05")
    assert wait_until(lambda: list((tmp_path / "run").glob("tensorboard/*")), pair[0])
    pair[1].send_signal(signal.SIGUSR1)
    for code, errors in finish(*pair):
        assert code == 0, errors
    assert len(steps(tmp_path / "run")) == 1
    assert 0 < steps(tmp_path / "run")[0] < 100000
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


def test_one_process_that_fails_ends_the_other(tmp_path):
    """The second one's disk is gone at step 3: it shows where, and the first one ends within seconds, not never."""
    flags = ["--config.train.steps=100000"]
    pair = start_together(2, tmp_path / "run", *flags, devices=1, TINY_PAUSE="0.05", TINY_FAIL="1:3")
    (first, told), (second, why) = finish(*pair, timeout=120)
    assert second == 1
    assert "the disk is gone" in why
    assert first != 0
    # Whichever the first process notices first: its neighbour's word, the coordinator's, or a broken connection.
    assert re.search("process 1 of this run failed|another task died|Connection (closed|reset)", told)


@pytest.mark.slow
def test_two_processes_with_other_data_are_refused(tmp_path):
    """One has 32 examples and one 31: before a step, one says so, and both end."""
    (first, told), (second, why) = finish(*start_together(2, tmp_path / "run", FOUR, rows=(32, 31)), timeout=120)
    assert (first, second) == (2, 2), told + why
    assert 'error: the data of process 1: {"examples": 31}; of process 0: {"examples": 32}; they must be' in why
    assert not (tmp_path / "run/tensorboard").exists()


def test_a_coordinator_that_does_not_answer_is_one_line(tmp_path):
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--process_id=1", "--coordinator_timeout=2"]
    ((code, errors),) = finish(start(tmp_path / "run", *flags))
    assert code == 2
    assert errors.strip().splitlines()[-1].startswith("error: no coordinator answers at localhost:")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_agree_that_a_checkpoint_is_bad(tmp_path):
    """Both stop with one line and exit code 2; with restore=previous both go on, and end as if nothing had happened."""
    run(*start_together(2, tmp_path / "run", FOUR, devices=1))
    corrupt(tmp_path / "run/checkpoints/4")
    for code, errors in finish(*start_together(2, tmp_path / "run", EIGHT, devices=1)):
        assert code == 2, errors
        assert "checkpoints/4" in errors or "of this run failed" in errors
    run(*start_together(2, tmp_path / "run", EIGHT, "--config.train.restore=previous", devices=1))
    run(*start_together(2, tmp_path / "quiet", EIGHT, devices=1))
    assert_same_bits(state_of(tmp_path / "run", 8), state_of(tmp_path / "quiet", 8))
    assert (tmp_path / "run/checkpoints/4.corrupt").is_dir()


@pytest.mark.slow
def test_the_autoencoder_of_the_tests_in_two_processes(tmp_path, pictures):
    """train.py itself on configs/openmoji.py:autoencoder_tiny: 4 steps agree with one process to 1e-3.

    A bias before a norm of one channel a group has no gradient but rounding errors, which Adam would make a step of.
    """
    flags = [f"--config.data.source=folder:{pictures}", "--config.train.sample_every=4", "--config.optim.eps=1e-3"]
    run(start(tmp_path / "one", *flags, devices=4, script=Path("train.py")))
    run(*start_together(2, tmp_path / "two", *flags, devices=2, script=Path("train.py")))
    one, two = (state_of(tmp_path / name, 4)["params"] for name in ("one", "two"))
    assert_close(one, two, 1e-3)
    assert [p.name for p in (tmp_path / "two/samples").iterdir()] == ["samples_0000004.png"]
    weights = "export/vae/diffusion_pytorch_model.safetensors"
    exported = [load_file(tmp_path / name / weights) for name in ("one", "two")]
    assert_close(*exported, 1e-3)
    run(start(tmp_path / "two", *flags, "--config.train.steps=5", devices=4, script=Path("train.py")))
