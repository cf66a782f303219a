"""The application: every API over one engine, the page, and errors in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

import sdjax
from sdjax.core.errors import UserError, printable
from sdjax.serve.api import jobs, openai
from sdjax.serve.api.a1111 import routes as a1111
from sdjax.serve.api.options import option_of
from sdjax.serve.engine import Engine
from sdjax.serve.jobs import QueueFullError
from sdjax.serve.requests import JobFailedError
from sdjax.serve.security import Access, Guard

PAGE = Path(__file__).parent / "page"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger("sdjax")


def make_app(engine: Engine, access: Access | None = None) -> Any:
    """The application over an engine that has started.

    Args:
        engine: of all requests.
        access: see `Access`; None for anybody at this machine's own address.
    """
    access = access or Access()
    app = FastAPI(title="sdjax", description=str(sdjax.__doc__), version="1")
    for module in (jobs, openai, a1111):
        app.include_router(module.router(engine))
    _add_states(app, engine)
    _add_errors(app)
    app.mount("/page", StaticFiles(directory=PAGE), name="files")
    app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"])
    return Guard(app, access)


def _add_states(app: FastAPI, engine: Engine) -> None:
    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """The server answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["state"])
    async def readyz() -> Response:
        """200 when models are loaded and compiled and requests are taken, else 503."""
        ready = engine.is_ready and not engine.is_draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Figures in Prometheus' form."""
        return Response(engine.metrics.text(), media_type=METRICS_TYPE)


def mistaken(request: Request, text: str, option: str | None) -> JSONResponse:
    """A client's mistake in a line; clients of OpenAI's read it from a field of their own."""
    body: dict[str, Any] = {"detail": text, "option": option}
    if request.url.path.startswith("/v1/images"):
        body["error"] = {"message": text, "type": "invalid_request_error", "param": option, "code": None}
    return JSONResponse(body, 422)


def _add_errors(app: FastAPI) -> None:
    """Errors as one line, never with a traceback."""

    @app.exception_handler(UserError)
    async def mistake(request: Request, error: UserError) -> JSONResponse:
        text = printable(error)
        return mistaken(request, text, option_of(text))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        text = printable(f"{place}: {first['msg']}" if place else first["msg"])
        return mistaken(request, text, option_of(place))

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": str(error.retry_after)})

    @app.exception_handler(JobFailedError)
    async def failed(request: Request, error: JobFailedError) -> JSONResponse:
        return JSONResponse({"detail": printable(error)}, 500)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse({"detail": "the server failed; its log says why"}, 500)
