"""A child process: a server's engine over a mesh of four virtual devices, beside one device."""

from __future__ import annotations

import asyncio
import sys

import jax
import numpy as np

import sdjax
from sdjax.data.images import to_uint8
from sdjax.parallel.mesh import make_mesh
from sdjax.serve.engine import Engine
from sdjax.serve.jobs import Call
from sdjax.serve.models import Models
from sdjax.serve.worker import EngineOptions

SIZE = {"height": 16, "width": 16}


def main(folder: str) -> None:
    assert jax.device_count() == 4
    mesh = make_mesh({"data": 4})
    engine = Engine(Models({"tiny": folder}, lambda source: sdjax.load(source, mesh=mesh)), EngineOptions((2, 4)))
    engine.start([(16, 16)]).result(600)
    wanted = [{"seed": seed, "steps": 3 + seed % 3, "sampler": ("ddim", "euler_a")[seed % 2]} for seed in range(7)]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **about: compiled.append(about) if event.endswith("backend_compile_duration") else None
    )

    async def one(options: dict, delay: float) -> np.ndarray:
        await asyncio.sleep(delay)
        job = await engine.submit(None, [Call("red heart", None, {**SIZE, **options})], "test")
        await job.finished()
        assert job.state == "done", job.error
        return job.results[0].pixels

    async def all_of_them() -> list[np.ndarray]:
        return await asyncio.gather(*(one(options, 0.05 * i) for i, options in enumerate(wanted)))

    made = asyncio.run(all_of_them())
    assert compiled == []
    engine.stop(60)
    pipe = sdjax.load(folder)
    for image, options in zip(made, wanted, strict=True):
        own = to_uint8(pipe("red heart", **SIZE, **options))[0]
        assert np.abs(own.astype(int) - image).max() <= 1, options
    print(f"{len(made)} images on four devices, within 1 of 255")


if __name__ == "__main__":
    main(sys.argv[1])
