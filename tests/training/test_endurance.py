"""A hundred kills, and a hundred disks that are full: the same command finishes, as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from launching import finish, run, start, state_of, steps, wait_until
from PIL import Image
from safetensors.numpy import load_file

from sdjax.training.checkpoint_folder import read_notes, whole_steps

STEPS, EVERY, TRIALS = 240, 4, 100
FLAGS = [f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}", "--config.train.sample_every=50"]
PARTIAL = "partial"  # in the names of files that are being written


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("quiet") / "run"
    run(start(workdir, *FLAGS))
    return workdir


def assert_whole(workdir: Path) -> None:
    """What has its final name can be read to its end."""
    checkpoints = epath.Path(workdir / "checkpoints")
    for step in whole_steps(checkpoints) if checkpoints.exists() else ():
        read_notes(checkpoints / str(step))
    for path in workdir.rglob("*"):
        if PARTIAL in str(path) or "checkpoints" in path.parts or "export.tmp" in path.parts or not path.is_file():
            continue
        if path.suffix == ".json" and path.name != "lock.json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            load_file(path)


def assert_finished(workdir: Path, quiet: Path) -> None:
    """The same bits and the same files as in a run that nothing disturbed; TensorBoard has a file a start."""
    assert_whole(workdir)
    jax.tree.map(np.testing.assert_array_equal, state_of(workdir, STEPS), state_of(quiet, STEPS))
    exports = [(path / "export/net.safetensors").read_bytes() for path in (workdir, quiet)]
    assert exports[0] == exports[1]
    left, expected = (
        {str(path.relative_to(folder)) for pattern in ("*", "*/*") for path in folder.glob(pattern)}
        for folder in (workdir, quiet)
    )
    assert {name for name in left ^ expected if not name.startswith("tensorboard/")} == set()


def has_begun(workdir: Path, pid: int) -> bool:
    """True if the lock is that of this process."""
    lock = workdir / "lock.json"
    return lock.exists() and f'"pid": {pid},' in lock.read_text()


def kill_once(workdir: Path, rng: random.Random) -> str:
    """Begins, waits for a moment of the start or for some checkpoints more, and kills; says in what."""
    process, before = start(workdir, *FLAGS, TINY_PAUSE="0.01"), max(steps(workdir), default=0)
    wait_until(lambda: has_begun(workdir, process.pid), process)
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, 2))
    else:
        target = before + EVERY * rng.randint(1, 6)
        wait_until(lambda: max(steps(workdir), default=0) >= min(target, STEPS), process)
        time.sleep(rng.uniform(0, 0.2))
    process.kill()
    ((code, errors),) = finish(process)
    assert code in (-signal.SIGKILL, 0), errors
    if code == 0:
        return "finished"
    return "writing" if any(workdir.glob("checkpoints/*tmp*")) else "computing" if steps(workdir) else "beginning"


@pytest.mark.slow
def test_a_hundred_kills(quiet, tmp_path):
    """SIGKILL at any moment but that of the imports; each run that gets to its end is compared, and another begun."""
    rng, where, number = random.Random(0), Counter(), 0
    for trial in range(TRIALS):
        workdir = tmp_path / f"run{number}"
        where[state := kill_once(workdir, rng)] += 1
        print(f"{trial + 1}: {state}, step {max(steps(workdir), default=0)}", flush=True)
        assert_whole(workdir)
        if state == "finished":
            assert_finished(workdir, quiet)
            number += 1
    run(start(workdir, *FLAGS))
    assert_finished(workdir, quiet)
    print(f"{dict(where)} in {number + 1} runs", flush=True)


SMALL_DISK = """
exec unshare --user --map-root-user --mount sh -c '
mount -t tmpfs -o size={size} tmpfs {disk} && cp -a {kept}/. {disk}/ || exit 99
{{command}}
code=$?
rm -rf {kept} && cp -a {disk} {kept} && exit $code
'
"""
"""A disk of so many bytes, which begins and ends with the files in `kept`: no other process sees it."""


@pytest.mark.slow
def test_a_hundred_full_disks(quiet, tmp_path):
    """A disk with room for some bytes more than there are: exit code 2 and one line; in the end there is room."""
    rng, where, number = random.Random(1), Counter(), 0
    disk = tmp_path / "disk"
    disk.mkdir()
    for trial in range(TRIALS):
        kept = tmp_path / f"kept{number}"
        kept.mkdir(exist_ok=True)
        used = sum(path.stat().st_size + 8192 for path in kept.rglob("*"))
        code, errors = on_disk(disk, kept, used + rng.randrange(2**12, 2**18))
        where[code] += 1
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        print(f"{trial + 1}: exit code {code}, step {max(steps(kept / 'run'), default=0)}: {said}", flush=True)
        assert (code, len(said)) in ((0, 0), (2, 1)), errors
        assert code == 0 or re.search(r"cannot write .*: No space left on device; make room", said[0])
        assert_whole(kept)
        if code == 0:
            assert_finished(kept / "run", quiet)
            number += 1
    code, errors = on_disk(disk, kept, 2**30)
    assert code == 0, errors
    assert_finished(kept / "run", quiet)
    print(f"{dict(where)} in {number + 1} runs", flush=True)


def on_disk(disk: Path, kept: Path, size: int) -> tuple[int, str]:
    """The run's exit code, and what it wrote to stderr."""
    shell = SMALL_DISK.format(size=size, disk=disk, kept=kept)
    ((code, errors),) = finish(start(disk / "run", *FLAGS, shell=shell))
    return code, errors
