"""This server's own API: jobs that are submitted, watched and cancelled, and the options of its models."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from sdjax.cli.records import parameters
from sdjax.cli.settings.read import read_settings
from sdjax.serve.api.options import describe, with_images
from sdjax.serve.engine import Engine
from sdjax.serve.images import encode_png, png_of
from sdjax.serve.jobs import Call, Job, is_json
from sdjax.serve.limits import IMAGES
from sdjax.serve.requests import server_sent

INTERVAL = 0.1  # seconds between two events
PNG = "image/png"


class JobRequest(BaseModel):
    """A request: a prompt and rows of the table of options."""

    model: str | None = Field(None, description="one of /v1/models; the server's current one where none is named")
    prompt: str | None = Field(None, description="in A1111's syntax; none for models that take none")
    negative_prompt: str | None = None
    options: dict[str, Any] = Field({}, description="see /v1/options; images are base64 or data URLs")


def router(engine: Engine) -> APIRouter:
    """Routes below /v1/jobs, and /v1/options and /v1/settings."""
    routes = APIRouter(prefix="/v1", tags=["jobs"])

    def find(key: str) -> Job:
        job = engine.jobs.get(key)
        if job is None:
            raise HTTPException(404, f"there is no job {key!r}")
        return job

    @routes.get("/options")
    async def options(model: str | None = None) -> dict[str, Any]:
        """Options that a model reads, with their ranges and defaults."""
        pipe = await engine.pipeline(model)
        return {"model": engine.models.find(model).name, **describe(pipe)}

    @routes.post("/jobs", status_code=201)
    async def submit(request: JobRequest) -> dict[str, Any]:
        """Submit a job; it waits in the queue."""
        given = await run_in_threadpool(with_images, request.options, engine.limits)
        job = await engine.submit(request.model, [Call(request.prompt, request.negative_prompt, given)], "jobs")
        return as_json(job)

    @routes.get("/jobs")
    async def jobs(limit: Annotated[int | None, Query(ge=1)] = None) -> dict[str, Any]:
        """All jobs that are remembered, or so many, the newest first."""
        return {"jobs": [as_json(job) for job in list(reversed(engine.jobs.values()))[:limit]]}

    @routes.get("/jobs/{key}")
    async def job(key: str) -> dict[str, Any]:
        """The state of a job."""
        return as_json(find(key))

    @routes.delete("/jobs/{key}")
    async def cancel(key: str) -> dict[str, Any]:
        """Cancel a job, between two network calls if it runs."""
        found = find(key)
        engine.cancel(found)
        return as_json(found)

    @routes.get("/jobs/{key}/images/{number}", response_class=Response, responses={200: {"content": {PNG: {}}}})
    async def image(key: str, number: int) -> Response:
        """A finished image, with its settings inside."""
        results = find(key).results
        result = results[number] if 0 <= number < len(results) else None
        if result is None:
            raise HTTPException(404, f"job {key!r} has no image {number}")
        return Response(encode_png(result), media_type=PNG)

    @routes.get("/jobs/{key}/preview", response_class=Response, responses={200: {"content": {PNG: {}}}})
    async def preview(key: str) -> Response:
        """The image that is furthest, as it is now."""
        shown = find(key).preview
        if shown is None:
            raise HTTPException(404, f"job {key!r} has no preview")
        return Response(png_of(shown), media_type=PNG, headers={"Cache-Control": "no-store"})

    @routes.get("/jobs/{key}/events", response_class=StreamingResponse)
    async def events(key: str) -> StreamingResponse:
        """Server-sent events: `progress` at every change, `end` at last, each with the job."""
        return StreamingResponse(_events(find(key)), media_type="text/event-stream")

    @routes.post("/settings")
    async def settings(file: UploadFile) -> dict[str, Any]:
        """Settings inside an image that this program or another wrote, in the names of options."""
        data = await file.read()
        found = await run_in_threadpool(read_settings, io.BytesIO(data), place="the file")
        values = {name: value for name, value in found.values.items() if name not in IMAGES and is_json(value)}
        refused = [str(error) for error in found.refused.values()]
        text = parameters({"prompt": "", **values})
        return {"settings": values, "text": text, "warnings": [*found.notes, *refused]}

    return routes


def as_json(job: Job) -> dict[str, Any]:
    """A job as clients see it."""
    images = [
        None
        if result is None
        else {
            "url": f"/v1/jobs/{job.id}/images/{number}",
            "settings": result.record,
            "parameters": parameters(result.record),
        }
        for number, result in enumerate(job.results)
    ]
    names = ("id", "state", "model", "place", "done", "total", "eta", "created", "error")
    preview = f"/v1/jobs/{job.id}/preview?v={job.previews}" if job.preview is not None else None
    state = {name: getattr(job, name) for name in names}
    return {**state, "prompt": job.records[0]["prompt"], "images": images, "preview": preview}


async def _events(job: Job) -> AsyncIterator[str]:
    async for _ in job.changes(INTERVAL):
        yield server_sent("end" if job.has_ended else "progress", json.dumps(as_json(job)))
        if job.has_ended:
            return
