"""Options that clients change, and the checkpoint's comings and goings."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from sdjax.serve.api.a1111.session import Session
from sdjax.serve.engine import Engine


def router(engine: Engine, session: Session) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @routes.get("/options")
    async def options() -> dict[str, Any]:
        """Options that act here."""
        return session.options()

    @routes.post("/options")
    async def change(changes: Annotated[dict[str, Any], Body()]) -> None:
        """Change options, and load the checkpoint that is named; others than those that act here are passed over."""
        await session.change(changes)

    @routes.post("/refresh-checkpoints")
    async def refresh() -> None:
        """Nothing: the server's checkpoints are those of its start."""

    @routes.post("/unload-checkpoint")
    async def unload() -> dict[str, Any]:
        """Free the current checkpoint's memory, unless a job needs it."""
        model = engine.models.find(None)
        await engine.call(lambda: engine.models.unload(model))
        return {}

    @routes.post("/reload-checkpoint")
    async def reload() -> dict[str, Any]:
        """Load the current checkpoint."""
        await engine.pipeline(None)
        return {}

    return routes
