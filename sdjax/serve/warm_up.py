"""Compiling before the first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.pipeline.execute import encode, finish
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import Row
from sdjax.serve import previews
from sdjax.serve.jobs import Job
from sdjax.serve.lanes import Begun, Lane, Passage
from sdjax.serve.models import Model
from sdjax.serve.worker import Worker

STEPS = 2
SQUARES = 8  # of random colours along a side of the image that previews are fitted to

logger = logging.getLogger("sdjax")


def warm_up(worker: Worker, model: Model, sizes: Sequence[tuple[int, int]] | None) -> None:
    """Compile a model's programs for all batch sizes, and fit its previews.

    Args:
        worker: whose batch sizes count.
        model: that is loaded.
        sizes: heights and widths; None for the size that it was trained on.

    Raises:
        UserError: a size is none that the model can make.
    """
    pipe = model.pipe
    assert pipe is not None, "loaded"
    for one in filter(None, (pipe, pipe.refiner, *pipe.later)):
        worker.colours[one] = fit_previews(one)
    began = time.monotonic()
    for size in [pipe.default_size] if sizes is None else sizes:
        for options in variants(pipe, size):
            try:
                (row,) = pipe.prepare(options.pop("prompt", None), None, **options)
            except UserError as error:
                if str(error).startswith(("height", "width")):
                    raise
                logger.info("%s compiles at its first request: %s", model.name, error)
                return
            compile_row(worker, model.name, pipe, row)
    logger.info("%s is compiled for %d sizes: %.0f s", model.name, len(sizes or [()]), time.monotonic() - began)


def variants(pipe: Pipeline, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Options of calls that together need all the usual programs: with guidance and without, from noise and images."""
    common: dict[str, Any] = {"steps": STEPS, "seed": 0, "height": size[0], "width": size[1]}
    traits = pipe.model.conditioner.traits
    if "prompt" in traits.required:
        common["prompt"] = ""
    if "class_label" in traits.required:
        common["class_label"] = 0
    blank = Image.new("RGB", (size[1], size[0]), "white")
    if pipe.controlnets:
        common["control_image"] = [blank] * len(pipe.controlnets)
    guided = pipe.model.has_null and not pipe.is_distilled
    cases = [{**common, "guidance_scale": scale} for scale in ((5.0, 1.0) if guided else (1.0,))]
    if pipe.begins_from_images and pipe.model.autoencoder is not None:
        cases.append({**cases[0], "init_image": blank, "strength": 1.0})
    return cases


def compile_row(worker: Worker, name: str, pipe: Pipeline, row: Row) -> None:
    """Run an image a step far through every stage in every batch size."""
    sizes = [size for size in worker.options.batch_sizes if size % pipe.devices.min_batch == 0]
    for part, one in enumerate([pipe, pipe.refiner][: len(row.parts)]):
        assert one is not None, "prepared with a refiner"
        passage = Passage(Job(name, [row], "warm-up", {}), 0, row)
        passage.part = part
        begun = Begun(one, passage, worker.length)
        for size in sizes:
            if worker.is_ending:
                return
            for other in sizes:
                Lane(one, begun, other).resize(size)
            lane, passage.begun = Lane(one, begun, size), begun
            lane.join(passage)
            for _ in range(STEPS):  # whose arguments come from joining, then from the call before
                lane.call(1)
            previews.preview(lane.x0, worker.colours[one])
            if part == len(row.parts) - 1:
                for other in sizes:
                    latents = lane.latents([0], other)
                    with one.devices.mesh_context():
                        finish(one, [row] * other, latents)
            else:
                lane.latents([0], one.devices.min_batch)
    if pipe.then is not None and row.then is not None:
        compile_row(worker, name, pipe.then, row.then)


def fit_previews(pipe: Pipeline) -> np.ndarray:
    """The colours of a model's latents, from an image of coloured squares that its autoencoder encodes."""
    if pipe.model.autoencoder is None:
        return previews.of_pixels(pipe.model)
    height, width = pipe.default_size
    colours = np.random.default_rng(0).random((SQUARES, SQUARES, 3))
    rows, columns = np.arange(height) * SQUARES // height, np.arange(width) * SQUARES // width
    image = colours[rows][:, columns].astype(np.float32)
    count = pipe.devices.min_batch
    with pipe.devices.mesh_context():
        moments = encode(pipe, np.stack([image] * count) * np.float32(2.0) - np.float32(1.0), 0, "preview")
    mean = np.asarray(pipe.devices.all_gather(moments))[:1]
    return previews.fit(mean[..., : mean.shape[-1] // 2], image[None])
