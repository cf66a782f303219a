"""Answers in A1111's form: images, the request again, and `info` (modules/processing.py, Processed.js)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.cli.records import SAMPLER_LABELS, parameters
from sdjax.serve.api.a1111.calls import Seeds
from sdjax.serve.api.a1111.fields import Generated, GenerationFields, ImageToImage
from sdjax.serve.images import encode_png, in_base64
from sdjax.serve.jobs import Job, Result


class About(NamedTuple):
    """Contents of an answer beside the images' own settings.

    Attributes:
        seeds: of all images.
        size: width and height of those that are sampled.
        extra: A1111's extra_generation_params.
        notes: fields that are not followed, a line each.
    """

    seeds: Seeds
    size: tuple[int, int]
    extra: Mapping[str, Any]
    notes: Sequence[str] = ()


def answer(request: GenerationFields, job: Job, results: Sequence[Result], about: About) -> Generated:
    """The answer of a job.

    Args:
        request, job: and what came of it.
        results: finished images; of a job that was interrupted those that it had.
        about: see there.
    """
    images = [in_base64(encode_png(result)) for result in results] if request.send_images is not False else []
    info = json.dumps(_info(request, job, results, about))
    return Generated(images=images, parameters=_said_again(request), info=info)


def stamp(seconds: float) -> str:
    """A time as A1111 writes it."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))


def _said_again(request: GenerationFields) -> dict[str, Any]:
    left_out = isinstance(request, ImageToImage) and not request.include_init_images
    return request.model_dump() | ({"init_images": None, "mask": None} if left_out else {})


def _info(request: GenerationFields, job: Job, results: Sequence[Result], about: About) -> dict[str, Any]:
    records, count = job.records, len(about.seeds.all)
    first = records[0]
    negatives = [record.get("negative_prompt") or "" for record in records]
    sampler = first["sampler"]
    return {
        "prompt": first["prompt"],
        "all_prompts": [record["prompt"] for record in records],
        "negative_prompt": negatives[0],
        "all_negative_prompts": negatives,
        "seed": about.seeds.all[0],
        "all_seeds": about.seeds.all,
        "subseed": about.seeds.sub[0],
        "all_subseeds": about.seeds.sub,
        "subseed_strength": 0,
        "width": about.size[0],
        "height": about.size[1],
        "sampler_name": SAMPLER_LABELS.get(sampler, sampler),
        "cfg_scale": first["guidance_scale"],
        "steps": request.steps or first["steps"],
        "batch_size": min(request.batch_size or 1, count),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.denoising_strength,
        "extra_generation_params": dict(about.extra),
        "index_of_first_image": 0,
        "infotexts": [parameters(result.record) for result in results],
        "styles": [],
        "job_timestamp": stamp(job.created),
        "clip_skip": (first.get("clip_skip") or 0) + 1,
        "is_using_inpainting_conditioning": False,
        "version": "sdjax",
        "comments": list(about.notes),
    }
