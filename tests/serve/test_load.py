"""Many requests at once: each gets what it gets alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from asking import ended
from test_engine import pixels, requests

from sdjax.serve.jobs import Call

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_sixty_four_requests_get_what_each_gets_alone(served, size):
    """With random samplers, steps, seeds and guidance; test_engine.py says why not all are the same to the bit."""
    engine, wanted, draw = served(batch_sizes=(size,)), requests(64), random.Random(1)

    async def alone():
        return [await ended(engine, **options) for options in wanted]

    async def at_once():
        return await asyncio.gather(*(ended(engine, delay=draw.random(), **options) for options in wanted))

    differences = [
        np.abs(pixels(own)[0].astype(int) - pixels(job)[0]).max()
        for own, job in zip(asyncio.run(alone()), asyncio.run(at_once()), strict=True)
    ]
    print(f"batches of {size}: {differences.count(0)} of 64 to the bit, the others within {max(differences)} of 255")
    assert max(differences) <= (0 if size == 1 else 1)
    assert differences.count(0) >= 40


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(served):
    """A tenth cancelled, a tenth malformed."""
    engine, draw = served(batch_sizes=(4,), queue_length=2000), random.Random(0)

    async def one(number):
        options = {"steps": draw.randint(1, 4), "seed": number, "height": 16, "width": 16}
        if number % 10 == 1:
            with pytest.raises(Exception, match="steps"):
                await ended(engine, **options | {"steps": "many"})
            return "malformed"
        job = await engine.submit(None, [Call("red heart", None, options)], "test")
        if number % 10 == 2:
            engine.cancel(job)
        await job.finished()
        return job.state

    async def all_of_them():
        return await asyncio.gather(*(one(number) for number in range(1000)))

    threads = threading.active_count()
    told = asyncio.run(all_of_them())
    assert (told.count("done"), told.count("cancelled"), told.count("malformed")) == (800, 100, 100)
    assert threading.active_count() <= threads
    assert len(engine.jobs) <= 200
    assert engine._holds == {}
    assert engine._worker.lanes == []
    assert all(model.users == 0 for model in engine.models.all.values())


@pytest.mark.slow
def test_the_same_pictures_on_a_mesh(folder):
    """Of four virtual devices, within 1 of 255."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("on_a_mesh.py")), str(folder)]
    more = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
