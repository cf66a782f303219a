"""Progress of the job that runs, and its end before it is done (modules/api/api.py, modules/progress.py)."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from sdjax.serve.api.a1111.answers import stamp
from sdjax.serve.api.a1111.coding import encoded
from sdjax.serve.api.a1111.fields import ProgressAnswer, TaskProgress, TaskQuery
from sdjax.serve.api.a1111.session import Session
from sdjax.serve.engine import Engine
from sdjax.serve.jobs import Job

LEAST = 0.01  # of a job that runs: clients wait for 0
URL = "data:image/png;base64,"
WAITING = "Waiting..."


def router(engine: Engine, session: Session) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["A1111"])

    @routes.get("/sdapi/v1/progress")
    async def progress(skip_current_image: bool = False) -> ProgressAnswer:
        """Progress of the oldest job of this API on the devices; 0 where there is none."""
        job = session.running()
        image = None if job is None or skip_current_image else await run_in_threadpool(preview_of, job)
        share, eta = (0.0, 0.0) if job is None else (share_of(job), job.eta or 0.0)
        return ProgressAnswer(progress=share, eta_relative=eta, state=state_of(job, session), current_image=image)

    @routes.post("/sdapi/v1/interrupt")
    async def interrupt() -> dict[str, Any]:
        """End the job that runs; its request is answered with the images that are finished."""
        session.interrupted = session.end_running()
        return {}

    @routes.post("/sdapi/v1/skip")
    async def skip() -> dict[str, Any]:
        """End the job that runs: its images are made together, so that all are skipped."""
        session.skipped = session.end_running()
        return {}

    @routes.get("/internal/ping")
    async def ping() -> dict[str, Any]:
        """Answer."""
        return {}

    @routes.post("/internal/progress")
    async def task_progress(query: TaskQuery) -> TaskProgress:
        """Progress of the job of a client's force_task_id."""
        job = engine.jobs.get(session.tasks.get(query.id_task or "", ""))
        if job is None or job.has_ended:
            return TaskProgress(active=False, queued=False, completed=job is not None, textinfo=WAITING)
        if job.state == "queued":
            place = f"In queue: {job.place} before this one"
            return TaskProgress(active=False, queued=True, completed=False, id_live_preview=-1, textinfo=place)
        number = job.previews
        is_new = query.live_preview is not False and number != query.id_live_preview
        image = await run_in_threadpool(preview_of, job) if is_new else None
        return TaskProgress(
            active=True,
            queued=False,
            completed=False,
            progress=share_of(job),
            eta=job.eta,
            live_preview=None if image is None else URL + image,
            id_live_preview=query.id_live_preview if image is None else number,
        )

    return routes


def share_of(job: Job) -> float:
    """The share of a job that is done, never 0."""
    return min(max(job.done / max(job.total, 1), LEAST), 1.0)


def preview_of(job: Job) -> str | None:
    """A job's preview as PNG in base64."""
    pixels = job.preview
    return None if pixels is None else encoded(pixels)


def state_of(job: Job | None, session: Session) -> dict[str, Any]:
    """A1111's state, in which an image is a job and its network calls are steps."""
    ended = {"skipped": session.skipped, "interrupted": session.interrupted, "stopping_generation": False}
    if job is None:
        none = {"job": "", "job_count": 0, "job_timestamp": stamp(time.time()), "job_no": 0}
        return ended | none | {"sampling_step": 0, "sampling_steps": 0}
    count = len(job.results)
    finished = sum(result is not None for result in job.results)
    steps = max(job.total // count, 1)
    named = {"job": job.id, "job_count": count, "job_timestamp": stamp(job.created), "job_no": finished}
    return ended | named | {"sampling_step": min(max(job.done // count, 0), steps), "sampling_steps": steps}
