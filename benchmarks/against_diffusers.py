"""The same work in PyTorch diffusers, from the same weights; only this file knows torch, and only when it is asked.

On a GPU the UNet and the decoder are compiled and their images kept channels last, which is how diffusers is run
fast there; on a CPU torch runs eagerly, with as many threads as this process has cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from benchmarks.measuring import Call
from benchmarks.work import GUIDANCE, PROMPT, Work
from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import write_component
from sdjax.core.errors import UserError, unknown
from sdjax.models.conditioning import Cond
from sdjax.pipeline.pipeline import Pipeline

LOADING = {"low_cpu_mem_usage": False}  # what diffusers does without accelerate, and warns of otherwise
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def unet_call(pipe: Pipeline, inputs: tuple[jax.Array, jax.Array, Cond], dtype: str) -> Call:
    """diffusers' UNet on the same latents and conditions.

    Raises:
        UserError: torch or diffusers is missing.
    """
    torch, diffusers = _modules()
    x, t, cond = inputs
    config = pipe.model.config
    extra = {} if config.vector_dim is None else {"addition_time_embed_dim": pipe.text.number_width}
    with tempfile.TemporaryDirectory() as folder:
        write_component(folder, "unet", Component(config, jax.device_get(pipe.params["unet"]), extra), dtype)
        model = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **LOADING)
    model = _prepared(torch, model)
    added = None
    if cond.vector is not None:
        pooled = _tensor(torch, cond.vector[:, : pipe.text.pooled_width], dtype)
        added = {
            "text_embeds": pooled,
            "time_ids": torch.full((len(x), pipe.text.numbers), 512.0, device=pooled.device),
        }
    guidance = None if cond.guidance is None else _tensor(torch, cond.guidance, dtype)
    latents, context = _tensor(torch, np.moveaxis(np.asarray(x), -1, 1), dtype), _tensor(torch, cond.context, dtype)
    steps = _tensor(torch, t, "float32")
    return _waiting(
        torch, lambda: model(latents, steps, context, added_cond_kwargs=added, timestep_cond=guidance).sample
    )


def decoder_call(pipe: Pipeline, z: jax.Array) -> Call:
    """diffusers' decoder on the same latents, in float32.

    Raises:
        UserError: torch or diffusers is missing.
    """
    torch, diffusers = _modules()
    with tempfile.TemporaryDirectory() as folder:
        vae = Component(pipe.autoencoder.config, jax.device_get(pipe.params["vae"]))
        write_component(folder, "vae", vae)
        model = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, **LOADING)
    model = _prepared(torch, model)
    latents = _tensor(torch, np.moveaxis(np.asarray(z), -1, 1), "float32")
    return _waiting(torch, lambda: model.decode(latents).sample)


def pipeline_call(pipe: Pipeline, work: Work, dtype: str) -> Call:
    """diffusers' pipeline with the same prompts and settings.

    Raises:
        UserError: torch or diffusers is missing, or it has no such sampler.
    """
    torch, diffusers = _modules()
    if work.sampler is not None and work.sampler not in SCHEDULERS:
        raise unknown("sampler", work.sampler, SCHEDULERS, "--sampler beside --against diffusers")
    with tempfile.TemporaryDirectory() as folder:
        pipe.save(Path(folder) / "model", dtype)
        theirs = diffusers.DiffusionPipeline.from_pretrained(
            Path(folder) / "model", torch_dtype=getattr(torch, dtype), safety_checker=None
        )
    theirs = theirs.to("cuda" if torch.cuda.is_available() else "cpu")
    if work.sampler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[work.sampler])
        theirs.scheduler = scheduler.from_config(theirs.scheduler.config)
    theirs.unet, theirs.vae = _prepared(torch, theirs.unet), _prepared(torch, theirs.vae)
    settings = {"num_inference_steps": work.steps, "guidance_scale": GUIDANCE, "output_type": "np"}
    size = {"width": work.size, "height": work.size}
    return _waiting(torch, lambda: theirs([PROMPT] * work.batch, **settings, **size).images)


def _modules() -> tuple[ModuleType, ModuleType]:
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise UserError(f"--against diffusers needs torch and diffusers: {error}") from error
    return torch, diffusers


def _prepared(torch: ModuleType, model: Any) -> Any:
    if not torch.cuda.is_available():
        return model.eval()
    torch.set_float32_matmul_precision("high")  # TF32, which XLA takes by default
    model = model.eval().to("cuda", memory_format=torch.channels_last)
    if hasattr(model, "decode"):
        model.decode = torch.compile(model.decode)
        return model
    return torch.compile(model, fullgraph=True)


def _tensor(torch: ModuleType, array: Any, dtype: str) -> Any:
    tensor = torch.from_numpy(np.array(array, np.float32)).to(getattr(torch, dtype))
    return tensor.to("cuda") if torch.cuda.is_available() else tensor


def _waiting(torch: ModuleType, function: Call) -> Call:
    def call() -> object:
        with torch.inference_mode():
            result = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

    return call
