"""All routes of A1111's API."""

from __future__ import annotations

from fastapi import APIRouter

from sdjax.serve.api.a1111 import control, extras, generate, lists, progress, settings
from sdjax.serve.api.a1111.session import Session
from sdjax.serve.engine import Engine


def router(engine: Engine) -> APIRouter:
    """The routes, which share what clients change."""
    session, routes = Session(engine), APIRouter()
    routes.include_router(generate.router(engine, session))
    routes.include_router(progress.router(engine, session))
    routes.include_router(settings.router(engine, session))
    routes.include_router(lists.router(engine))
    routes.include_router(control.router(engine))
    routes.include_router(extras.router(engine))
    return routes
