"""Killed processes and full disks leave no damaged file under a final name, and the same command completes a folder.

python -m pytest tests/pipeline/test_sample_faults.py -n 0 -m slow -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import HASTY
from PIL import Image

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FLAGS = ("--steps=2", "--guidance_scale=2", "--batch_size=2", "--prompt=red heart")


def run(how: str, count: int, images: int, outdir: Path, folder: Path, kind: str) -> dict[str, int]:
    command = [sys.executable, HERE / "sample_faults.py", how, str(count), outdir, kind]
    command += [f"--config={ROOT / 'configs/openmoji.py:tiny'}", f"--checkpoint={folder}", f"--outdir={outdir}", *FLAGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": HASTY}
    done = subprocess.run([*command, f"--num_images={images}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(how, kind, done.stdout)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "count", "images", "kind"),
    [("kill", 10, 200, "model"), ("full", 5, 6, "model"), ("kill", 100, 2000, "noise"), ("full", 100, 20, "noise")],
)
def test_faults_leave_no_damaged_file(how: str, count: int, images: int, kind: str, folder: Path, tmp_path: Path):
    happened = run(how, count, images, tmp_path / "faults", folder, kind)
    assert happened["files"] == 2 * images + 1
    assert happened["left"] == 0, "temporary files are removed at the next start"
    run("full", 0, images, tmp_path / "undisturbed", folder, kind)
    for number in range(images):
        first, second = (
            np.asarray(Image.open(tmp_path / name / f"{number:05d}.png"), int) for name in ("faults", "undisturbed")
        )
        assert np.abs(first - second).max() <= 1
