"""The passes of a call: each stage on the devices in turn, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import Table, schedule_of
from sdjax.pipeline import stages
from sdjax.pipeline.devices import Devices
from sdjax.pipeline.given import Inputs
from sdjax.pipeline.noise import Noises
from sdjax.pipeline.request import Settings, Shape
from sdjax.tasks.latent import Asked, Guidance, Start, System, Text
from sdjax.tasks.latent.tiles import Coder, decode_tiled, encode_tiled

# What the published x4 upscaler noises its small picture with, for single files, which do not say it.
LOW_RESOLUTION_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}

Progress = Callable[[int, int], None]
"""progress(done, total) network calls; called from another thread."""


class Model(NamedTuple):
    """What a pass needs of a pipeline.

    Attributes:
        name, dtype: as `Pipeline`'s.
        system, params: the networks.
        shape: which sizes it can make.
        devices: where its arrays go.
        low_resolution: an upscaler's scheduler config for its small picture; None for the published one.
    """

    name: str
    dtype: str
    system: System
    params: dict[str, Any]
    shape: Shape
    devices: Devices
    low_resolution: Mapping[str, Any] | None

    def check(self, finite: Any, stage: str) -> None:
        """Raises a UserError that names the stage unless what it made is finite."""
        if not finite:
            hint = "" if self.dtype == "float32" else f"; {self.dtype} may be too narrow, try float32"
            raise UserError(f"{stage} is not finite: the weights of {self.name} hold values that overflow{hint}")


class Job(NamedTuple):
    """What a call needs on the host, one row an image; None where nothing is given.

    Attributes:
        text, negative: prompts and negative prompts.
        negative_share: see `Asked`.
        numbers, negative_numbers: SDXL's micro-conditioning.
        lengths: see `Asked`.
        indices: of the images.
        noises: from outside, in place of the images' own.
        inputs: pictures, masks and depth maps.
    """

    text: Text
    negative: Text
    negative_share: Float[np.ndarray, " n"]
    numbers: Float[np.ndarray, "n k"] | None
    negative_numbers: Float[np.ndarray, "n k"] | None
    lengths: Int[np.ndarray, " n"] | None
    indices: Int[np.ndarray, " n"]
    noises: Noises
    inputs: Inputs

    def rows(self, chosen: Int[np.ndarray, " b"]) -> Job:
        return jax.tree.map(lambda values: values[chosen], self)


class Run(NamedTuple):
    """A model's part of a call.

    Attributes:
        model, job, table: of this part.
        part: 0 for all of a call or for the base, 1 for the refiner, whose noise is its own.
    """

    model: Model
    job: Job
    table: Table
    part: int = 0


def finish(
    runs: Sequence[Run], settings: Settings, batch: int, decoded: bool, progress: Progress | None
) -> Float[np.ndarray, "n H W c"]:
    """All passes of a call, each through every model in turn; the last one decodes.

    Raises:
        UserError: a stage's output is not finite.
    """
    count, last = len(runs[0].job.indices), runs[-1].model
    rows = [stages.rows_of(run.table) for run in runs]
    total, done, parts = sum(rows) * -(-count // batch), 0, []
    for first in range(0, count, batch):
        chosen = np.minimum(np.arange(first, first + batch), count - 1)
        latents: Any = None
        for run, calls in zip(runs, rows, strict=True):
            # A program of several processes that calls back to one of them would wait for the others.
            alone = jax.process_count() == 1
            listener = _Counter(progress, done, total) if progress is not None and alone else None
            latents = sample_latents(run._replace(job=run.job.rows(chosen)), settings, listener, latents)
            done += calls
            if progress is not None and not alone:
                progress(done, total)
        if decoded:
            parts.append(decode(last, latents, settings.tile))
        else:
            parts.append(np.asarray(last.devices.everywhere(latents)) / np.float32(last.system.scale))
    return np.concatenate(parts)[:count]


def sample_latents(
    run: Run, settings: Settings, listener: Callable[[int], None] | None, noisy: jax.Array | None = None
) -> jax.Array:
    """Scaled latents after the table's rows, from `noisy` latents of another model where some are given."""
    model, job, table, part = run
    devices, shape = model.devices, model.shape.latents(settings.height, settings.width)
    # jax.random.key reads the bits, so that large seeds need no 64-bit integers.
    seed = np.array(settings.seed, np.uint32).view(np.int32)
    keys, noise = stages.noise_stage(
        devices.whole(seed), devices.rows(job.indices), shape, devices.whole(np.int32(part))
    )
    if job.noises.first is not None:
        noise = devices.rows(job.noises.first)
    conditions = _conditions(model, job, settings, keys)
    start = _start(run, settings, noise)
    if noisy is not None:
        start = start._replace(x=noisy)
    # 1 or less is none, as in diffusers; so is 0 for models distilled to need none.
    guidance = devices.whole(Guidance(max(settings.guidance_scale, 1.0), settings.guidance_rescale))
    steps, watched = devices.rows(job.noises.steps), listener is not None

    def walk(table: Table) -> tuple[jax.Array, jax.Array]:
        rows = devices.whole(_in_float32(table))
        return stages.sampling_stage(
            model.system, model.params, rows, conditions, guidance, start, keys, steps, watched=watched
        )

    with stages.listening(listener):
        latents, finite = walk(table)
    if not finite:
        row = stages.first_bad_row(lambda shorter: bool(walk(shorter)[1]), table)
        model.check(
            finite,
            f"the UNet's output at network call {row + 1} of {stages.rows_of(table)} "
            f"(timestep {table.timestep[row]:g}, guidance scale {settings.guidance_scale:g})",
        )
    return latents


def encode(model: Model, pictures: np.ndarray, tile: int, what: str) -> jax.Array:
    """Scaled latents of pictures in [-1, 1], in tiles where a side is longer than `tile` pixels.

    Raises:
        UserError: they are not finite; it calls the picture `what`.
    """
    coder, checks = _checked(stages.image_stage, model)
    factor = model.shape.factor
    latents = encode_tiled(coder, model.devices.rows(pictures), *_tiling(tile, factor, pictures.shape[1:3]), factor)
    model.check(all(checks), f"the autoencoder's encoding of the {what}")
    return latents


def decode(model: Model, latents: jax.Array, tile: int) -> Float[np.ndarray, "b H W c"]:
    """Pictures in [0, 1] of scaled latents, in tiles where a side would be longer than `tile` pixels.

    Raises:
        UserError: they are not finite.
    """
    coder, checks = _checked(stages.decode_stage, model)
    factor = model.shape.factor
    size = latents.shape[1] * factor, latents.shape[2] * factor
    images = decode_tiled(coder, latents, *_tiling(tile, factor, size), factor)
    model.check(all(checks), "the autoencoder's decoded picture")
    return np.asarray(model.devices.everywhere(images))


def _checked(stage: Callable[..., tuple[jax.Array, jax.Array]], model: Model) -> tuple[Coder, list[jax.Array]]:
    """A stage for one tile, and what it answers of each: whether it is finite."""
    checks: list[jax.Array] = []

    def coder(values: jax.Array) -> jax.Array:
        made, finite = stage(model.system, model.params, values)
        checks.append(finite)
        return made

    return coder, checks


def _tiling(tile: int, factor: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Side and overlap of tiles in latents; 0 pixels are no tiles."""
    side = max(1, tile // factor) if tile else max(size) // factor
    return side, side // 4


def _conditions(model: Model, job: Job, settings: Settings, keys: jax.Array) -> tuple[Any, ...]:
    """What the UNet is told: of the prompts alone where there is no guidance, which halves the work."""
    words = Asked(job.text, job.negative, job.negative_share, job.numbers, job.negative_numbers, job.lengths)
    rows = jax.tree.map(model.devices.rows, words)
    halves, finite = stages.text_stage(model.system, model.params, rows, clip_skip=settings.clip_skip)
    model.check(finite, "the text encoder's output")
    told = TELLERS[model.system.extra](model, job, settings, keys)
    distilled = model.system.unet.config.guidance_dim is not None
    chosen = halves[:1] if distilled or settings.guidance_scale <= 1.0 else halves
    return tuple(half._replace(**told) for half in chosen)


def _told_nothing(model: Model, job: Job, settings: Settings, keys: jax.Array) -> dict[str, jax.Array]:
    del model, job, settings, keys
    return {}


def _told_mask(model: Model, job: Job, settings: Settings, keys: jax.Array) -> dict[str, jax.Array]:
    """The mask, then the latents of the picture whose masked part is grey (runwayml's inpainting model)."""
    del keys
    pictures, mask, factor = job.inputs.pictures, job.inputs.mask, model.shape.factor
    assert pictures is not None, "check_given"
    assert mask is not None, "check_given"
    latents = encode(model, pictures * (mask < 0.5), settings.tile, "masked picture")
    return {"concat": jnp.concatenate([model.devices.rows(mask[:, ::factor, ::factor]), latents], axis=-1)}


def _told_depth(model: Model, job: Job, settings: Settings, keys: jax.Array) -> dict[str, jax.Array]:
    del settings, keys
    return {"concat": model.devices.rows(job.inputs.depth)}


def _told_picture(model: Model, job: Job, settings: Settings, keys: jax.Array) -> dict[str, jax.Array]:
    """A small picture with noise of a level that the UNet is told as its class."""
    level, small = settings.noise_level, job.inputs.small
    assert small is not None, "check_given"
    abar = schedule_of(model.low_resolution or LOW_RESOLUTION_SCHEDULE).alphas_cumprod[level]
    given, whole = model.devices.rows((small, job.noises.picture)), model.devices.whole(np.float32(abar))
    noisy = stages.low_resolution_stage(keys, given[0], whole, given[1])
    return {"concat": noisy, "label": model.devices.rows(np.full(len(small), level, np.int32))}


TELLERS = {"nothing": _told_nothing, "masked": _told_mask, "depth": _told_depth, "picture": _told_picture}
"""The fields of `Cond` that come from pictures, by the kind of model (`System.extra`)."""


def _start(run: Run, settings: Settings, noise: jax.Array) -> Start:
    """Pure noise, or the given picture with some."""
    model, inputs = run.model, run.job.inputs
    pictures, mask = inputs.pictures, inputs.mask
    h, w, z = model.shape.latents(settings.height, settings.width)
    if pictures is None:
        known = model.devices.rows(np.zeros((len(run.job.indices), h, w, z), np.float32))
    else:
        known = encode(model, pictures, settings.tile, "given picture")
    kept = np.ones((len(run.job.indices), h, w, 1), np.float32)
    if mask is not None and model.system.extra != "masked":
        kept = mask[:, :: model.shape.factor, :: model.shape.factor]
    # Painting anew at full strength knows nothing of the picture below the mask (diffusers' inpainting).
    fresh = pictures is None or (mask is not None and settings.strength == 1.0)
    table, new = model.devices.whole((_in_float32(run.table), np.float32(fresh)))
    return stages.start_stage(table, noise, known, model.devices.rows(kept), new)


def _in_float32(table: Table) -> Table:
    return Table(*(values if values.dtype == bool else values.astype(np.float32) for values in table))


class _Counter:
    """Turns the numbers of rows, which arrive in no certain order, into progress that only grows."""

    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self._progress, self._before, self._total, self._done = progress, before, total, 0

    def __call__(self, row: int) -> None:
        if row + 1 > self._done:
            self._done = row + 1
            self._progress(self._before + self._done, self._total)
