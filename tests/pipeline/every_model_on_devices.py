"""Sample every kind of model on all devices: MODELS FILES TARGET.npz; as one of two: MODELS FILES OUTDIR PORT ID."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from every_model import KINDS, STEPS, flags_of, options_of, sources_of

import sample
import sdjax
from sdjax.parallel.distributed import initialise
from sdjax.parallel.mesh import make_mesh


def named(files: Path) -> dict[str, Path]:
    return {path.stem: path for path in files.iterdir()}


def on_a_mesh(models: Path, files: dict[str, Path], target: str) -> None:
    made = {}
    for name, kind in KINDS.items():
        mesh = make_mesh({"data": 2, "fsdp": 2})
        pipe = sdjax.load(models / name, mesh=mesh, **sources_of(kind, files))
        made[name] = pipe(kind.prompt, num_images=4, steps=STEPS, batch_size=4, seed=5, **options_of(kind, files))
    np.savez(target, **made)


def as_one_of_two(models: Path, files: dict[str, Path], outdir: Path) -> None:
    for name, kind in KINDS.items():
        flags = [*flags_of(kind, files, models / name), "--num_images=2", "--seed=5", f"--outdir={outdir / name}"]
        flags += ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
        flags = [flag.replace("--batch_size=2", "--batch_size=4") for flag in flags]
        flags += [] if kind.prompt is None else [f"--prompt={kind.prompt}"]
        sys.argv = ["sample.py", *flags]  # from which ml_collections takes what is set in a config
        config, flag = sample.read_command_line(sys.argv)
        request = sample.read_request(config, flag)
        sample.generate_all(request, *sample.load(request.sources, config))


if __name__ == "__main__":
    models, files = Path(sys.argv[1]), named(Path(sys.argv[2]))
    if len(sys.argv) == 4:
        on_a_mesh(models, files, sys.argv[3])
    else:
        outdir, port, number = sys.argv[3:]
        initialise(
            coordinator=f"localhost:{port}",
            processes=2,
            process_id=int(number),
            coordinator_timeout=300,
            heartbeat_timeout=100,
        )
        as_one_of_two(models, files, Path(outdir))
