"""Routes' common part: waiting for a job whose client may leave, and server-sent events."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from sdjax.serve.engine import Engine
from sdjax.serve.jobs import Job

POLL = 0.5  # seconds between two looks whether the client is still there


class JobFailedError(Exception):
    """A job ended without its images; one line says why."""


async def wait_for(engine: Engine, job: Job, request: Request) -> Job:
    """The job when it has ended; it is cancelled where its client leaves before.

    Raises:
        JobFailedError: it failed.
    """
    ended = asyncio.ensure_future(job.finished())
    try:
        while not (await asyncio.wait({ended}, timeout=POLL))[0]:
            if await request.is_disconnected():
                engine.cancel(job)
    finally:
        ended.cancel()
        engine.cancel(job)  # which leaves one that has ended as it is
    if job.state == "failed":
        raise JobFailedError(job.error)
    return job


def server_sent(event: str, data: str) -> str:
    """A server-sent event, whose data is one line."""
    return f"event: {event}\ndata: {data}\n\n"
