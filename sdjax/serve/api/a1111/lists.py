"""Lists of what there is, as A1111's clients fill their menus with them; empty where nothing of a kind is here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from sdjax.pipeline.loras import lora_files
from sdjax.pipeline.pipeline import Pipeline
from sdjax.serve.api.a1111.enlarging import upscalers
from sdjax.serve.api.a1111.fields import (
    CheckpointItem,
    EmbeddingItem,
    Embeddings,
    LoraItem,
    SamplerItem,
    SchedulerItem,
    UpscalerItem,
)
from sdjax.serve.api.a1111.samplers import samplers, schedulers
from sdjax.serve.api.a1111.session import filename
from sdjax.serve.api.a1111.units import SCRIPT
from sdjax.serve.engine import Engine

# Kinds of things that A1111 has and this server does not.
NONE = ("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "latent-upscale-modes", "sd-vae")
NONE += ("extensions",)
# A script of the ControlNet extension, without which webuiapi sends the units of one request again with the next.
MARK = "controlnet m2m"


def router(engine: Engine) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @routes.get("/sd-models")
    async def sd_models() -> list[CheckpointItem]:
        """Checkpoints, by the names that requests have for them."""
        models = engine.models.all.values()
        return [
            CheckpointItem(
                title=model.name, model_name=model.name, hash=None, sha256=None, filename=filename(model), config=None
            )
            for model in models
        ]

    @routes.get("/samplers")
    async def all_samplers() -> list[SamplerItem]:
        """Samplers."""
        return samplers()

    @routes.get("/schedulers")
    async def all_schedulers() -> list[SchedulerItem]:
        """Spacings of noise levels."""
        return schedulers()

    @routes.get("/upscalers")
    async def all_upscalers() -> list[UpscalerItem]:
        """Ways to enlarge an image."""
        return upscalers(engine.models.all.values())

    @routes.get("/loras")
    async def loras() -> list[LoraItem]:
        """LoRAs that prompts may name."""
        return await run_in_threadpool(_loras, await engine.pipeline(None))

    @routes.get("/embeddings")
    async def embeddings() -> Embeddings:
        """Words of textual inversion that prompts may have."""
        return _embeddings(await engine.pipeline(None))

    @routes.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """Scripts that alwayson_scripts may name."""
        return {"txt2img": [SCRIPT, MARK], "img2img": [SCRIPT, MARK]}

    @routes.get("/script-info")
    async def script_info() -> list[dict[str, Any]]:
        """The same with more words."""
        about = {"name": SCRIPT, "is_alwayson": True, "args": []}
        return [{**about, "is_img2img": is_img2img} for is_img2img in (False, True)]

    @routes.get("/cmd-flags")
    async def cmd_flags() -> dict[str, Any]:
        """Flags of the server that its clients may know."""
        return {"api": True}

    @routes.get("/memory")
    async def memory() -> dict[str, Any]:
        """Memory of the machine and of the first device."""
        return {"ram": _ram(), "cuda": _device()}

    for name in NONE:
        routes.add_api_route(f"/{name}", _nothing, response_model=list[dict[str, Any]], summary="Nothing of this kind.")
    return routes


async def _nothing() -> list[dict[str, Any]]:
    return []


def _loras(pipe: Pipeline) -> list[LoraItem]:
    aliases = {lora.name: lora.alias for lora in pipe.loras}
    return [
        LoraItem(name=name, alias=aliases.get(name) or name, path=path.name, metadata={})
        for name, path in lora_files(pipe).items()
    ]


def _embeddings(pipe: Pipeline) -> Embeddings:
    """Words of the current model. Others' are not read."""
    width = pipe.text.encoders[0].config.width if pipe.checkpoint.placeholders else 0
    none = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    words = {
        word: EmbeddingItem(shape=width, vectors=count, **none) for word, count in pipe.checkpoint.placeholders.items()
    }
    return Embeddings(loaded=words, skipped={})


def _ram() -> dict[str, Any]:
    """Bytes of this process and of the machine."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        used = int(Path("/proc/self/statm").read_text().split()[1]) * page
        total = os.sysconf("SC_PHYS_PAGES") * page
    except (OSError, ValueError, IndexError):
        return {"error": "unavailable"}
    return {"free": total - used, "used": used, "total": total}


def _device() -> dict[str, Any]:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return {"error": "unavailable"}
    used, total = stats["bytes_in_use"], stats["bytes_limit"]
    return {"system": {"free": total - used, "used": used, "total": total}}
