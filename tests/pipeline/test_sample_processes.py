"""sample.py by two processes over loopback: each writes its share, and the images are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
import pytest
from PIL import Image

from sdjax.data.images import to_uint8

ROOT = Path(__file__).parents[2]
FLAGS = ("--steps=3", "--guidance_scale=2", "--sampler=euler_a", "--seed=4")
PROMPTS = ("red heart", "flag", "green apple", "blue heart", "cat", "dog")


@pytest.mark.slow
def test_two_processes_write_what_one_would(folder, ours, tmp_path):
    """Six prompts, each second one in fewer steps, in two batches over data 2 x fsdp 2.

    Within one level of 255, for sums are taken in another order.
    """
    lines = [prompt + " --steps 2" * (i % 2) for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    command = [sys.executable, ROOT / "sample.py", f"--config={ROOT}/configs/openmoji.py:tiny", *FLAGS]
    command += [f"--checkpoint={folder}", f"--from_file={tmp_path}/prompts.txt", f"--outdir={tmp_path}/made"]
    command += ["--config.mesh.data=2", "--config.mesh.fsdp=2", f"--coordinator=localhost:{children.free_port()}"]
    environment = os.environ | {"XLA_FLAGS": children.devices(2)}
    running = [
        subprocess.Popen(
            [*command, "--processes=2", f"--process_id={i}"], env=environment, cwd=ROOT, stdout=-1, stderr=-1, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0].strip().splitlines()[-1] == str(tmp_path / "made")  # above it, gloo tells of its peers
    files = {f"{i:05d}.{end}" for i in range(6) for end in ("png", "json")} | {"grid.png"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == files
    for i, prompt in enumerate(PROMPTS):
        how = {"steps": 3 - i % 2, "sampler": "euler_a", "seed": 4, "guidance_scale": 2, "first_index": i}
        (expected,) = ours(prompt, batch_size=2, **how)
        made = np.asarray(Image.open(tmp_path / "made" / f"{i:05d}.png"), np.int16)
        assert np.abs(made - to_uint8(expected).astype(np.int16)).max() <= 1, prompt
        assert made.std() > 1.0
