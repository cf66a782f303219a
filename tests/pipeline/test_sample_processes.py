"""sample.py by two processes over loopback: each writes its share, and the pictures are those of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
FLAGS = ("--steps=3", "--guidance_scale=2", "--sampler=euler_a", "--seed=4")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(source: Path, prompts: Path, outdir: Path, devices: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "sample.py", f"--config={ROOT}/configs/openmoji.py:tiny", *FLAGS, *flags]
    command += [f"--checkpoint={source}", f"--from_file={prompts}", f"--outdir={outdir}"]
    environment = os.environ | {"XLA_FLAGS": children.devices(devices)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=-1, stderr=-1, text=True)


def test_two_processes_write_what_one_would(theirs, tmp_path):
    """Five prompts over data 2 x fsdp 2; within one level of 255, for sums are taken in another order."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\nflag\ngreen apple --steps 2\nblue heart\ncat\n")
    together = [
        f"--coordinator=localhost:{free_port()}",
        "--processes=2",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
    ]
    running = [
        start(theirs.folder, prompts, tmp_path / "two", 2, *together, f"--process_id={number}") for number in range(2)
    ]
    alone = start(theirs.folder, prompts, tmp_path / "one", 1)
    said = [process.communicate(timeout=300) for process in (*running, alone)]
    assert [process.returncode for process in (*running, alone)] == [0, 0, 0], said
    last = [out.strip().splitlines()[-1] for out, _ in (said[0], said[2])]  # above it, gloo tells of its peers
    assert last == [str(tmp_path / "two"), str(tmp_path / "one")]
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 11, "a picture and a record each, and the grid"
    for name in (name for name in files[0] if name.endswith("png")):
        one, two = (np.asarray(Image.open(tmp_path / folder / name), np.int16) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1, name
        assert one.std() > 1.0
