"""Routes of A1111's ControlNet extension (Mikubill/sd-webui-controlnet, scripts/api.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from sdjax.data.hints.makers import INPAINT, hint_maker
from sdjax.data.images import on_white
from sdjax.serve.api.a1111.coding import decoded, encoded
from sdjax.serve.api.a1111.fields import Finite
from sdjax.serve.api.a1111.units import MODULES, maker_of
from sdjax.serve.engine import Engine
from sdjax.serve.limits import Limits

VERSION = 2  # of the extension's own API


class Detect(BaseModel):
    """A request of detect."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(default_factory=list)
    controlnet_threshold_a: Finite = -1
    controlnet_threshold_b: Finite = -1


def router(engine: Engine) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/controlnet", tags=["A1111"])

    @routes.get("/version")
    async def version() -> dict[str, int]:
        """The version of the extension's API."""
        return {"version": VERSION}

    @routes.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        """ControlNets of the current checkpoint."""
        pipe = await engine.pipeline(None)
        return {"model_list": list(pipe.controlnets)}

    @routes.get("/module_list")
    async def module_list() -> dict[str, Any]:
        """Makers of hints."""
        return {"module_list": list(MODULES), "module_detail": {}}

    @routes.get("/settings")
    async def settings() -> dict[str, int]:
        """The number of units that act at a time."""
        pipe = await engine.pipeline(None)
        return {"control_net_unit_count": len(pipe.controlnets)}

    @routes.post("/detect")
    async def detect(body: Detect) -> dict[str, Any]:
        """Hints of images, at their own size."""
        images = body.controlnet_input_images
        if not images:
            raise HTTPException(422, "No image selected")
        if len(images) > engine.limits.max_images:
            raise HTTPException(
                422, f"controlnet_input_images: {len(images)} images; at most {engine.limits.max_images}"
            )
        name = maker_of(body.controlnet_module, (body.controlnet_threshold_a, body.controlnet_threshold_b))
        if name == INPAINT:
            raise HTTPException(422, "Module not supported")
        return {"images": await run_in_threadpool(_hints, images, name, engine.limits), "info": "Success"}

    return routes


def _hints(images: list[str], name: str, limits: Limits) -> list[str]:
    make = hint_maker(name)
    given = [decoded(text, f"controlnet_input_images {i}", limits) for i, text in enumerate(images)]
    return [encoded(make(np.asarray(on_white(image)))) for image in given]
