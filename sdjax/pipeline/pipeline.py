"""A checkpoint that is called with prompts and answers with pictures."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from sdjax.convert.components import Checkpoint
from sdjax.convert.folder import write_folder
from sdjax.core.errors import UserError, unknown
from sdjax.data.tokenizers import Tokenizer
from sdjax.diffusion.samplers import Table, schedule_of
from sdjax.parallel.sharding import BATCH_AXES, batch_sharding, check_batch, replicated
from sdjax.pipeline import stages
from sdjax.pipeline.extras import Extras, Given, check_given, load_extras
from sdjax.pipeline.inputs import Pictures, load_masks, load_pictures
from sdjax.pipeline.noise import Draws, Noises, torch_noises
from sdjax.pipeline.prompting import read_prompts
from sdjax.pipeline.request import STRENGTH, Number, Pair, Settings, Shape, hand_over, resolve, texts, whole
from sdjax.tasks.latent import Asked, Guidance, Start, System, Text
from sdjax.tasks.latent.system import SIZES

OUTPUTS = ("image", "latent")
# Pixels of a batch when the caller does not choose: one picture of 1024 x 1024, four of 512 x 512.
BATCH_PIXELS = 2**20

# What the published x4 upscaler noises its small picture with, for single files, which do not say it.
LOW_RESOLUTION_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}

Progress = Callable[[int, int], None]
"""progress(done, total) network calls; called from another thread."""

logger = logging.getLogger("sdjax")


class Job(NamedTuple):
    """What a call needs on the host, one row an image; None where nothing is given.

    Attributes:
        text, negative: prompts and negative prompts.
        negative_share: see `Asked`.
        numbers, negative_numbers: SDXL's micro-conditioning.
        indices: of the images.
        noises: from outside, in place of the images' own.
        pictures: to begin from, [-1, 1].
        mask: over the latents, 1 where the picture is painted anew.
        extras: for further input channels.
    """

    text: Text
    negative: Text
    negative_share: Float[np.ndarray, " n"]
    numbers: Float[np.ndarray, "n k"] | None
    negative_numbers: Float[np.ndarray, "n k"] | None
    indices: Int[np.ndarray, " n"]
    noises: Noises
    pictures: Float[np.ndarray, "n H W 3"] | None
    mask: Float[np.ndarray, "n h w 1"] | None
    extras: Extras

    def rows(self, chosen: Int[np.ndarray, " b"]) -> Job:
        return jax.tree.map(lambda values: values[chosen], self)


class Run(NamedTuple):
    """A pipeline's part of a call: all of it, or the base's or the refiner's."""

    pipe: Pipeline
    job: Job
    table: Table


class Pipeline:
    """A latent diffusion model and how to sample it; made by `sdjax.load`.

    Attributes:
        name: of the checkpoint.
        params: by network, e.g. {"unet": ..., "vae": ..., "text_encoder": ...}, on the devices.
        system: the networks.
        tokenizers: one a text encoder.
        shape: which sizes it can make.
        scheduler_config: how its training noised, and its own sampler.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        system: System,
        tokenizers: tuple[Tokenizer, ...],
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> None:
        """Takes a checkpoint whose parameters are on the devices already."""
        self.name, self.system, self.tokenizers = name, system, tokenizers
        self.scheduler_config, self.dtype = checkpoint.scheduler_config, dtype
        self.shape = Shape(
            factor=system.autoencoder.config.factor,
            channels=system.autoencoder.config.latent_channels,
            default=_default_size(checkpoint, system.autoencoder.config.factor),
        )
        self._mesh, self._defaults = mesh, checkpoint.defaults
        parts = checkpoint.components()
        self.params = {name: part.params for name, part in parts.items()}
        # The checkpoint keeps no second hold of them; `save` takes the parameters from here.
        empty = {name: dataclasses.replace(part, params={}) for name, part in parts.items()}
        self._checkpoint = dataclasses.replace(checkpoint, **empty)

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Writes a diffusers folder that diffusers itself loads.

        Raises:
            UserError: the folder holds something that sdjax did not write, or a parameter is not finite in `dtype`.
        """
        host = jax.device_get(self._everywhere(self.params))
        parts = {n: dataclasses.replace(getattr(self._checkpoint, n), params=host[n]) for n in host}
        write_folder(folder, dataclasses.replace(self._checkpoint, **parts), dtype)

    def settings(self, **given: Any) -> Settings:
        """What a call with these keyword arguments resolves to; see `__call__`.

        Raises:
            UserError: as `__call__`.
        """
        settings = resolve(given, self._defaults, self.scheduler_config, self.shape)
        settings.table(self.scheduler_config)  # which has its own opinion of sampler, schedule and steps
        return settings

    def batch_size(self, images: int, height: int, width: int) -> int:
        """The number of images of each pass when the caller does not say: a power of two that suits their size."""
        shards = self._shards
        most = max(1, BATCH_PIXELS // (height * width))
        each = 2 ** (min(-(-images // shards), most) - 1).bit_length()
        return shards * min(each, 2 ** (most.bit_length() - 1))

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        guidance_scale: Number | None = None,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_images: int = 1,
        latents: Float[Any, "n h w z"] | None = None,
        init_image: Pictures | None = None,
        strength: Number | None = None,
        mask: Pictures | None = None,
        output: str = "image",
        guidance_rescale: Number = 0.0,
        eta: Number | None = None,
        syntax: str | None = None,
        clip_skip: int = 0,
        rng: str | None = None,
        original_size: Pair | None = None,
        crop: Pair | None = None,
        target_size: Pair | None = None,
        aesthetic_score: Number | None = None,
        negative_aesthetic_score: Number | None = None,
        noise_level: int | None = None,
        refiner: Pipeline | None = None,
        refiner_start: Number = 0.8,
        first_index: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "n H W c"]:
        """Makes pictures: `num_images` of the first prompt, then of the next.

        None means what the checkpoint says: its own defaults, its scheduler config, the size it was trained on.

        Args:
            prompts: one or several, in A1111's syntax: (word:1.2), [word], BREAK; longer ones are read in chunks.
            negative_prompt: one for all, or one a prompt: what guidance leads away from. None is "", or for SDXL's
                base the zeros that it was trained with.
            steps: of the sampler; some call the network more than once a step (see `make_table`).
            sampler: a key of `sdjax.diffusion.samplers.SAMPLERS`.
            schedule: one of its SPACINGS, e.g. trailing or karras.
            guidance_scale: of classifier-free guidance; 1 or less is none.
            seed: 0 to 2^32 - 1; with an image's index it decides all its noise, whatever the batch and the devices.
            width: in pixels; a multiple of `shape.factor`.
            height: in pixels, likewise.
            num_images: of each prompt.
            latents: standard normal first noise of all images, before any scaling; by itself it decides the size.
            init_image: a picture to begin from, one for all or one a prompt, see `load_pictures`; an upscaler's small
                one.
            strength: in (0, 1], the share of the steps that the given picture goes through; None is 0.75, and 1 for
                inpainting models.
            mask: white where the given picture is painted anew, the rest is kept; see `load_masks`.
            output: "image", or "latent" for unscaled latents.
            guidance_rescale: phi of Lin et al. 2024, 0 to 1.
            eta: of DDIM (0 deterministic) or of the ancestral samplers (1 as they are known).
            syntax: "a1111", or "plain" for prompts that are read as they stand and cut at the encoder's length.
            clip_skip: layers of the text encoders to skip; A1111's "clip skip 2" is 1 for SD 1.
            rng: "jax", or "torch" for the noise that PyTorch diffusers draws on a CPU for this seed.
            original_size, crop, target_size: what SDXL is told of a picture: its size before it was cut, (height,
                width), where it was cut, (top, left), and the size it was made for; None is this call's size, (0, 0).
            aesthetic_score, negative_aesthetic_score: what SDXL's refiner is told.
            noise_level: of an upscaler's small picture, 0 to 999; more lets it invent more.
            refiner: a pipeline that takes over the noisy latents, from the share `refiner_start` of the levels on.
            refiner_start: in (0, 1).
            first_index: the first image's index: with first_index=5 it is the sixth of a call without.
            batch_size: images of one pass, a multiple of the mesh's data x fsdp devices; the last pass is filled up,
                so that with a fixed one any number of prompts compiles once.
            progress: told of every network call.

        Returns:
            float32 [n, height, width, 3] in [0, 1], or the latents [n, h, w, z].

        Raises:
            UserError: an argument is not what it should be, or a stage's output is not finite.
        """
        if output not in OUTPUTS:
            raise unknown("output", output, OUTPUTS)
        given = Given(init_image, mask)
        kind = self.system.extra
        check_given(kind, given)
        prompted, negatives = texts(prompts, negative_prompt, num_images)
        if latents is not None:
            latents, height, width = self._check_latents(latents, len(prompted), height, width)
        settings = self.settings(
            steps=steps,
            sampler=sampler,
            schedule=schedule,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            seed=seed,
            width=width,
            height=height,
            strength=self._strength(init_image, strength),
            syntax=syntax,
            clip_skip=clip_skip,
            rng=rng,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            noise_level=noise_level,
        )
        size = (settings.height, settings.width)
        batch = self.batch_size(len(prompted), *size) if batch_size is None else whole("batch_size", batch_size)
        if self._mesh is not None:
            check_batch(batch, self._mesh, "batch_size")
        first = whole("first_index", first_index, 0)
        indices = np.arange(first, first + len(prompted), dtype=np.int32)
        job = self._job(prompted, negatives, negative_prompt is None, settings, indices)
        job = self._with_pictures(job, given, settings, num_images)
        job = job._replace(noises=self._noises(job, settings, latents))
        runs = [Run(self, job, settings.table(self.scheduler_config))]
        if refiner is not None:
            refined = refiner._job(prompted, negatives, negative_prompt is None, settings, indices)
            base, rest = hand_over(settings, self.scheduler_config, refiner.scheduler_config, refiner_start)
            runs = [Run(self, job, base), Run(refiner, refined, rest)]
        return _finish(runs, settings, batch, output == "image", progress)

    def _strength(self, init_image: Pictures | None, strength: Number | None) -> Number | None:
        if init_image is None or self.system.extra == "picture":
            return None
        if strength is not None:
            return strength
        return 1.0 if self.system.extra == "masked" else STRENGTH

    def _job(
        self, prompts: list[str], negatives: list[str], default: bool, settings: Settings, indices: np.ndarray
    ) -> Job:
        """A job from words alone; `default` says that the negative prompts were not the caller's."""
        text, negative = read_prompts(self.tokenizers, prompts, negatives, settings.syntax)
        numbers = [settings.numbers(self.system.numbers, negative) for negative in (False, True)]
        rows = [None if n is None else np.tile(np.asarray(n, np.float32), (len(prompts), 1)) for n in numbers]
        zeros = self._checkpoint.model_index.get("force_zeros_for_empty_prompt", self.system.numbers == SIZES)
        share = np.full(len(prompts), 0.0 if default and zeros else 1.0, np.float32)
        return Job(text, negative, share, rows[0], rows[1], indices, Noises(), None, None, Extras())

    def _with_pictures(self, job: Job, given: Given, settings: Settings, num_images: int) -> Job:
        size, kind, images = (settings.height, settings.width), self.system.extra, len(job.indices)
        count = images // num_images

        def spread(rows: np.ndarray | None) -> np.ndarray | None:
            """One row an image, of one row or of one a prompt."""
            if rows is None:
                return None
            return np.broadcast_to(rows, (images, *rows.shape[1:])) if len(rows) == 1 else rows.repeat(num_images, 0)

        pictures: np.ndarray | None = None
        masks: np.ndarray | None = None
        if given.init_image is not None and kind != "picture":
            pictures = load_pictures(given.init_image, count, size)
            if given.mask is not None and kind != "masked":
                masks = load_masks(given.mask, count, size, self.shape.latents(*size)[:2])
        extras = load_extras(kind, given, count, size, self.shape)
        return job._replace(
            pictures=spread(pictures), mask=spread(masks), extras=Extras(*(spread(rows) for rows in extras))
        )

    def _noises(self, job: Job, settings: Settings, latents: np.ndarray | None) -> Noises:
        if settings.rng == "jax":
            return Noises(latents)
        shape, picture = self.shape.latents(settings.height, settings.width), job.extras.picture
        draws = Draws(
            picture=None if picture is None else picture.shape[1:],
            posterior=job.pictures is not None and (settings.strength != 1.0 or self.system.extra != "masked"),
            masked=job.mask is not None or job.extras.masked is not None,
        )
        images = range(int(job.indices[0]), int(job.indices[-1]) + 1)
        noises = torch_noises(settings.seed, images, shape, settings.table(self.scheduler_config), draws)
        return noises if latents is None else noises._replace(first=latents)

    def _sample(
        self,
        job: Job,
        settings: Settings,
        table: Table,
        listener: Callable[[int], None] | None,
        noisy: jax.Array | None = None,
    ) -> jax.Array:
        """Scaled latents after the table's rows, from `noisy` latents of another model where some are given."""
        shape = self.shape.latents(settings.height, settings.width)
        # jax.random.key reads the bits, so that large seeds need no 64-bit integers.
        seed = np.array(settings.seed, np.uint32).view(np.int32)
        keys, noise = stages.noise_stage(self._whole(seed), self._put(job.indices), shape)
        if job.noises.first is not None:
            noise = self._put(job.noises.first)
        conditions = self._conditions(job, settings, keys)
        start = self._start(job, settings, table, noise)
        if noisy is not None:
            start = start._replace(x=noisy)
        # 1 or less is none, as in diffusers; so is 0 for models distilled to need none.
        guidance = self._whole(Guidance(max(settings.guidance_scale, 1.0), settings.guidance_rescale))
        steps = self._put(job.noises.steps)

        def run(table: Table, watched: bool) -> tuple[jax.Array, jax.Array]:
            return stages.sampling_stage(
                self.system,
                self.params,
                self._whole(_in_float32(table)),
                conditions,
                guidance,
                start,
                keys,
                steps,
                watched=watched,
            )

        with stages.listening(listener):
            latents, finite = run(table, listener is not None)
        if not finite:
            row = stages.first_bad_row(lambda shorter: bool(run(shorter, listener is not None)[1]), table)
            self._check(
                finite,
                f"the UNet's output at network call {row + 1} of {stages.rows_of(table)} "
                f"(timestep {table.timestep[row]:g}, guidance scale {settings.guidance_scale:g})",
            )
        return latents

    def _conditions(self, job: Job, settings: Settings, keys: jax.Array) -> tuple[Any, ...]:
        """What the UNet is told: of the prompts alone where there is no guidance, which halves the work."""
        words = Asked(job.text, job.negative, job.negative_share, job.numbers, job.negative_numbers)
        halves, finite = stages.text_stage(
            self.system, self.params, jax.tree.map(self._put, words), clip_skip=settings.clip_skip
        )
        self._check(finite, "the text encoder's output")
        told = self._told(job.extras, job.noises.picture, settings, keys)
        distilled = self.system.unet.config.guidance_dim is not None
        chosen = halves[:1] if distilled or settings.guidance_scale <= 1.0 else halves
        return tuple(half._replace(**told) for half in chosen)

    def _told(
        self, extras: Extras, noise: np.ndarray | None, settings: Settings, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """The fields of `Cond` that come from pictures."""
        if extras.masked is not None:
            assert extras.channels is not None
            mask, masked = self._put(extras.channels), self._put(extras.masked)
            joined, finite = stages.masked_stage(self.system, self.params, mask, masked)
            self._check(finite, "the autoencoder's encoding of the masked picture")
            return {"concat": joined}
        if extras.picture is not None:
            level, schedule = settings.noise_level, self._checkpoint.low_res_scheduler_config
            abar = schedule_of(schedule or LOW_RESOLUTION_SCHEDULE).alphas_cumprod[level]
            pictures = self._put(extras.picture)
            noisy = stages.low_resolution_stage(keys, pictures, self._whole(np.float32(abar)), self._put(noise))
            return {"concat": noisy, "label": self._put(np.full(len(pictures), level, np.int32))}
        return {}

    def _start(self, job: Job, settings: Settings, table: Table, noise: jax.Array) -> Start:
        h, w, z = self.shape.latents(settings.height, settings.width)
        if job.pictures is None:
            known = self._put(np.zeros((len(job.indices), h, w, z), np.float32))
        else:
            known, finite = stages.image_stage(self.system, self.params, self._put(job.pictures))
            self._check(finite, "the autoencoder's encoding of the given picture")
        mask = np.ones((len(job.indices), h, w, 1), np.float32) if job.mask is None else job.mask
        # Painting anew at full strength knows nothing of the picture below the mask (diffusers' inpainting).
        painted = job.mask is not None or job.extras.masked is not None
        fresh = job.pictures is None or (painted and settings.strength == 1.0)
        return stages.start_stage(
            self._whole(_in_float32(table)), noise, known, self._put(mask), self._whole(np.float32(fresh))
        )

    def _pictures(self, latents: jax.Array, decoded: bool) -> Float[np.ndarray, "b H W c"]:
        if not decoded:
            return np.asarray(self._everywhere(latents)) / np.float32(self.system.scale)
        images, finite = stages.decode_stage(self.system, self.params, latents)
        self._check(finite, "the autoencoder's decoded picture")
        return np.asarray(self._everywhere(images))

    def _check(self, finite: jax.Array, stage: str) -> None:
        if not finite:
            hint = "" if self.dtype == "float32" else f"; {self.dtype} may be too narrow, try float32"
            raise UserError(f"{stage} is not finite: the weights of {self.name} hold values that overflow{hint}")

    def _check_latents(
        self, latents: Any, count: int, height: int | None, width: int | None
    ) -> tuple[Float[np.ndarray, "n h w z"], int, int]:
        latents, factor = np.asarray(latents, np.float32), self.shape.factor
        if latents.ndim == 4:
            height, width = height or latents.shape[1] * factor, width or latents.shape[2] * factor
        wanted = (count, *self.shape.latents(height or 0, width or 0))
        if latents.shape != wanted:
            raise UserError(f"latents have the shape {list(latents.shape)}; it must be {list(wanted)}, NHWC")
        if not np.isfinite(latents).all():
            raise UserError("latents hold values that are not finite")
        return latents, height or 0, width or 0

    @property
    def _shards(self) -> int:
        return 1 if self._mesh is None else int(np.prod([self._mesh.shape[axis] for axis in BATCH_AXES]))

    def _put(self, rows: Any) -> Any:
        """One row an image, split over the devices of the batch axes."""
        return jax.device_put(rows, None if self._mesh is None else batch_sharding(self._mesh))

    def _whole(self, values: Any) -> Any:
        return jax.device_put(values, None if self._mesh is None else replicated(self._mesh))

    def _everywhere(self, values: Any) -> Any:
        """So that every process can read all of it."""
        return values if self._mesh is None else jax.device_put(values, replicated(self._mesh))


class _Counter:
    """Turns the numbers of rows, which arrive in no certain order, into progress that only grows."""

    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self._progress, self._before, self._total, self._done = progress, before, total, 0

    def __call__(self, row: int) -> None:
        if row + 1 > self._done:
            self._done = row + 1
            self._progress(self._before + self._done, self._total)


def _in_float32(table: Table) -> Table:
    return Table(*(values if values.dtype == bool else values.astype(np.float32) for values in table))


def _finish(
    runs: Sequence[Run], settings: Settings, batch: int, decoded: bool, progress: Progress | None
) -> Float[np.ndarray, "n H W c"]:
    """All passes of a call, each through every model in turn; the last one decodes."""
    count, last = len(runs[0].job.indices), runs[-1].pipe
    rows = [stages.rows_of(run.table) for run in runs]
    total, done, parts = sum(rows) * -(-count // batch), 0, []
    for first in range(0, count, batch):
        chosen = np.minimum(np.arange(first, first + batch), count - 1)
        latents: Any = None
        for run, calls in zip(runs, rows, strict=True):
            listener = None if progress is None else _Counter(progress, done, total)
            latents = run.pipe._sample(run.job.rows(chosen), settings, run.table, listener, latents)
            done += calls
        parts.append(last._pictures(latents, decoded))
    return np.concatenate(parts)[:count]


def _default_size(checkpoint: Checkpoint, factor: int) -> tuple[int, int]:
    """Height and width in pixels; diffusers keeps them as the UNet's sample_size, 64 where it says nothing."""
    size = checkpoint.unet.extra.get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height * factor, width * factor
