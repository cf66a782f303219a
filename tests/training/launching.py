"""Runs of tiny_run.py, and of train.py, in processes of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import children
import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
TINY = Path("tests/training/tiny_run.py")
QUIET = ["--config.optim.schedule=constant", "--config.optim.name=adamw", "--config.optim.learning_rate=0.01"]
QUIET += ["--config.train.sample_every=100000"]


def start(
    workdir: Path, *flags: str, devices: int = 1, script: Path = TINY, shell: str = "{command}", **variables: str
) -> subprocess.Popen:
    """One process, of a shell's script if there is one; its stderr goes to a pipe."""
    command = [sys.executable, str(script), "--config=configs/openmoji.py:autoencoder_tiny", f"--workdir={workdir}"]
    line = shell.format(command=shlex.join([*command, *QUIET, *flags]))
    environment = {
        "XLA_FLAGS": children.devices(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    return subprocess.Popen(
        ["sh", "-c", line] if shell != "{command}" else shlex.split(line),
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(
    count: int, workdir: Path, *flags: str, rows: tuple[int, ...] = (), **options
) -> list[subprocess.Popen]:
    """Processes that find each other over loopback; each has so many rows of data, where `rows` are given."""
    address = f"--coordinator=localhost:{children.free_port()}"
    own = [{"TINY_ROWS": str(number)} for number in rows] or [{}] * count
    return [
        start(workdir, address, f"--processes={count}", f"--process_id={i}", *flags, **options, **own[i])
        for i in range(count)
    ]


def finish(*processes: subprocess.Popen, timeout: float = 300.0) -> list[tuple[int, str]]:
    """The exit codes and what was written to stderr; nothing is left running."""
    deadline, ends = time.monotonic() + timeout, []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(deadline - time.monotonic(), 1.0))
            ends.append((process.returncode, errors))
    finally:
        for process in processes:
            process.kill()
    return ends


def run(*processes: subprocess.Popen) -> None:
    """Waits until all have ended well."""
    for code, errors in finish(*processes):
        assert code == 0, errors


def wait_until(condition, process: subprocess.Popen, seconds: float = 240.0) -> bool:
    """Whether it came true while the process ran."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)
    return True


def steps(workdir: Path) -> list[int]:
    """Of the whole checkpoints, in order."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def state_of(workdir: Path, step: int) -> dict:
    """Everything in a checkpoint's state, as NumPy arrays."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    checkpointer = ocp.StandardCheckpointer()
    metadata = checkpointer.metadata(folder).item_metadata.tree
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata)
    return jax.tree.map(np.asarray, checkpointer.restore(folder, shapes))


def corrupt(checkpoint: Path) -> None:
    """Changes one byte of an array in the middle of the largest file."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 64
    largest.write_bytes(raw)
