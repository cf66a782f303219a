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

from sdjax.convert.folder import Checkpoint, write_folder
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.data.tokenizers import Tokenizer
from sdjax.diffusion.samplers import Table
from sdjax.parallel.sharding import BATCH_AXES, batch_sharding, check_batch, replicated, tree_shardings
from sdjax.pipeline import stages
from sdjax.pipeline.inputs import Pictures, load_masks, load_pictures
from sdjax.pipeline.request import Number, Settings, Shape, resolve, texts, whole
from sdjax.tasks.latent import Guidance, Start, System

COMPONENTS = ("unet", "vae", "text_encoder")
OUTPUTS = ("image", "latent")
# Pixels of a batch when the caller does not choose: one picture of 1024 x 1024, four of 512 x 512.
BATCH_PIXELS = 2**20

Progress = Callable[[int, int], None]
"""progress(done, total) network calls; called from another thread."""

logger = logging.getLogger("sdjax")


class _Job(NamedTuple):
    """What a call needs on the host, one row an image; None where nothing is given."""

    tokens: Int[np.ndarray, "n l"]
    negatives: Int[np.ndarray, "n l"]
    indices: Int[np.ndarray, " n"]
    noise: Float[np.ndarray, "n h w z"] | None
    pictures: Float[np.ndarray, "n H W 3"] | None
    mask: Float[np.ndarray, "n h w 1"] | None

    def rows(self, chosen: Int[np.ndarray, " b"]) -> _Job:
        return jax.tree.map(lambda values: values[chosen], self)


class Pipeline:
    """A latent diffusion model and how to sample it; made by `sdjax.load`.

    Attributes:
        name: of the checkpoint.
        params: {"unet": ..., "vae": ..., "text_encoder": ...}, on the devices.
        system: the networks.
        shape: which sizes it can make.
        scheduler_config: how its training noised, and its own sampler.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        system: System,
        tokenizer: Tokenizer,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> None:
        """Moves the parameters to the device, or onto the mesh; the autoencoder's stay float32."""
        self.name, self.system, self.tokenizer = name, system, tokenizer
        self.scheduler_config, self.dtype = checkpoint.scheduler_config, dtype
        self.shape = Shape(
            factor=system.autoencoder.config.factor,
            channels=system.autoencoder.config.latent_channels,
            default=_default_size(checkpoint, system.autoencoder.config.factor),
        )
        self._mesh, self._defaults = mesh, checkpoint.defaults
        narrow = dtype_named(dtype)
        host = {name: getattr(checkpoint, name).params for name in COMPONENTS}
        host |= {name: jax.tree.map(lambda x: x.astype(narrow), host[name]) for name in ("unet", "text_encoder")}
        self.params = jax.device_put(host, None if mesh is None else tree_shardings(host, mesh))
        # The host's copy is let go; `save` takes the parameters from here.
        empty = {name: dataclasses.replace(getattr(checkpoint, name), params={}) for name in COMPONENTS}
        self._checkpoint = dataclasses.replace(checkpoint, **empty)

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Writes a diffusers folder that diffusers itself loads.

        Raises:
            UserError: the folder holds something that sdjax did not write, or a parameter is not finite in `dtype`.
        """
        host = jax.device_get(self._everywhere(self.params))
        parts = {n: dataclasses.replace(getattr(self._checkpoint, n), params=host[n]) for n in COMPONENTS}
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
        strength: Number = 0.75,
        mask: Pictures | None = None,
        output: str = "image",
        guidance_rescale: Number = 0.0,
        eta: Number | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "n H W c"]:
        """Makes pictures: `num_images` of the first prompt, then of the next.

        None means what the checkpoint says: its own defaults, its scheduler config, the size it was trained on.

        Args:
            prompts: one or several; what goes beyond the text encoder's tokens is cut, with a warning in the log.
            negative_prompt: one for all, or one a prompt: what guidance leads away from.
            steps: of the sampler; Heun and DPM2 call the network 2 steps - 1 times, PLMS steps + 1.
            sampler: a key of `sdjax.diffusion.samplers.SAMPLERS`.
            schedule: one of its SPACINGS: leading, linspace, trailing, karras.
            guidance_scale: of classifier-free guidance; 1 or less is none.
            seed: 0 to 2^32 - 1; with an image's index it decides all its noise, whatever the batch and the devices.
            width: in pixels; a multiple of `shape.factor`.
            height: in pixels, likewise.
            num_images: of each prompt.
            latents: standard normal first noise of all images, before any scaling; by itself it decides the size.
            init_image: a picture to begin from, one for all or one a prompt; see `load_pictures`.
            strength: in (0, 1], the share of the steps that the given picture goes through.
            mask: white where the given picture is painted anew, the rest is kept; see `load_masks`.
            output: "image", or "latent" for unscaled latents.
            guidance_rescale: phi of Lin et al. 2024, 0 to 1.
            eta: of DDIM (0 deterministic) or of the ancestral samplers (1 as they are known).
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
        if mask is not None and init_image is None:
            raise UserError("a mask needs an init_image whose unmasked part is kept")
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
            strength=None if init_image is None else strength,
        )
        size = (settings.height, settings.width)
        count = len(prompted) // num_images
        pictures = None if init_image is None else load_pictures(init_image, count, size)
        masks = None if mask is None else load_masks(mask, count, size, self.shape.latents(*size)[:2])
        job = _Job(
            tokens=self._tokenize(prompted),
            negatives=self._tokenize(negatives),
            indices=whole("first_index", first_index, 0) + np.arange(len(prompted), dtype=np.int32),
            noise=latents,
            pictures=_spread(pictures, len(prompted), num_images),
            mask=_spread(masks, len(prompted), num_images),
        )
        batch = self.batch_size(len(prompted), *size) if batch_size is None else whole("batch_size", batch_size)
        if self._mesh is not None:
            check_batch(batch, self._mesh, "batch_size")
        return self._run(job, settings, batch, output == "image", progress)

    def _run(
        self, job: _Job, settings: Settings, batch: int, decoded: bool, progress: Progress | None
    ) -> Float[np.ndarray, "n H W c"]:
        table = settings.table(self.scheduler_config)
        count, rows, parts = len(job.tokens), stages.rows_of(table), []
        total = rows * -(-count // batch)
        for first in range(0, count, batch):
            chosen = np.minimum(np.arange(first, first + batch), count - 1)
            part = job.rows(chosen)
            listener = None if progress is None else _Counter(progress, rows * (first // batch), total)
            latents = self._sample(part, settings, table, listener)
            parts.append(self._decode(latents) if decoded else np.asarray(self._everywhere(latents)))
        return np.concatenate(parts)[:count]

    def _sample(self, job: _Job, settings: Settings, table: Table, listener: Callable[[int], None] | None) -> jax.Array:
        shape = self.shape.latents(settings.height, settings.width)
        conditions, finite = stages.text_stage(
            self.system, self.params, self._put(job.tokens), self._put(job.negatives)
        )
        self._check(finite, "the text encoder's output")
        # jax.random.key reads the bits, so that large seeds need no 64-bit integers.
        seed = np.array(settings.seed, np.uint32).view(np.int32)
        keys, noise = stages.noise_stage(self._whole(seed), self._put(job.indices), shape)
        if job.noise is not None:
            noise = self._put(job.noise)
        start = self._start(job, settings, table, noise)
        # 1 or less is none, as in diffusers; so is 0 for models distilled to need none.
        guidance = self._whole(Guidance(max(settings.guidance_scale, 1.0), settings.guidance_rescale))

        def run(table: Table, watched: bool) -> tuple[jax.Array, jax.Array]:
            return stages.sampling_stage(
                self.system,
                self.params,
                self._whole(_in_float32(table)),
                conditions,
                guidance,
                start,
                keys,
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

    def _start(self, job: _Job, settings: Settings, table: Table, noise: jax.Array) -> Start:
        h, w, z = self.shape.latents(settings.height, settings.width)
        if job.pictures is None:
            known = self._put(np.zeros((len(job.tokens), h, w, z), np.float32))
        else:
            known, finite = stages.image_stage(self.system, self.params, self._put(job.pictures))
            self._check(finite, "the autoencoder's encoding of the given picture")
        mask = np.ones((len(job.tokens), h, w, 1), np.float32) if job.mask is None else job.mask
        # Painting anew at full strength knows nothing of the picture below the mask (diffusers' inpainting).
        fresh = job.pictures is None or (job.mask is not None and settings.strength == 1.0)
        return stages.start_stage(
            self._whole(_in_float32(table)), noise, known, self._put(mask), self._whole(np.float32(fresh))
        )

    def _decode(self, latents: jax.Array) -> Float[np.ndarray, "b H W 3"]:
        images, finite = stages.decode_stage(self.system, self.params, latents)
        self._check(finite, "the autoencoder's decoded picture")
        return np.asarray(self._everywhere(images))

    def _check(self, finite: jax.Array, stage: str) -> None:
        if not finite:
            hint = "" if self.dtype == "float32" else f"; {self.dtype} may be too narrow, try float32"
            raise UserError(f"{stage} is not finite: the weights of {self.name} hold values that overflow{hint}")

    def _tokenize(self, prompts: list[str]) -> Int[np.ndarray, "n l"]:
        for prompt, cut in dict(zip(prompts, self.tokenizer.truncated(prompts), strict=True)).items():
            if cut:
                logger.warning("the prompt %.40r is too long: %r was cut from its end", prompt, cut)
        return self.tokenizer.encode(prompts)

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

    def _put(self, rows: np.ndarray) -> jax.Array:
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


def _spread(rows: np.ndarray | None, images: int, num_images: int) -> np.ndarray | None:
    """One row an image, of one row or of one a prompt."""
    if rows is None:
        return None
    return np.broadcast_to(rows, (images, *rows.shape[1:])) if len(rows) == 1 else np.repeat(rows, num_images, axis=0)


def _default_size(checkpoint: Checkpoint, factor: int) -> tuple[int, int]:
    """Height and width in pixels; diffusers keeps them as the UNet's sample_size, 64 where it says nothing."""
    size = checkpoint.unet.extra.get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height * factor, width * factor
