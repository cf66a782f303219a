"""Requests to an engine, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from sdjax.serve.engine import Engine
from sdjax.serve.jobs import Call, Job


async def ended(engine: Engine, prompt: str | None = "red heart", delay: float = 0.0, **options: Any) -> Job:
    """A job of one call when it has ended."""
    await asyncio.sleep(delay)
    job = await engine.submit(None, [Call(prompt, None, options)], "test")
    await job.finished()
    return job


def together(*jobs: Coroutine[Any, Any, Any]) -> list[Any]:
    """The answers of requests that are sent at once."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*jobs)

    return asyncio.run(gather())
