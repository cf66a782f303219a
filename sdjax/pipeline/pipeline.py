"""A checkpoint that is called with prompts and answers with pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sdjax.convert.components import Checkpoint
from sdjax.convert.folder import write_checkpoint
from sdjax.core.errors import UserError, unknown
from sdjax.data.tokenizers import Tokenizer
from sdjax.diffusion.samplers import Table
from sdjax.parallel.sharding import check_batch
from sdjax.pipeline.devices import Devices
from sdjax.pipeline.given import Given, Inputs, check_given, count_of, load_inputs
from sdjax.pipeline.inputs import Pictures, paste_back, size_of
from sdjax.pipeline.noise import Draws, Noises, torch_noises
from sdjax.pipeline.prompting import Prompts, read_prompts, tell
from sdjax.pipeline.request import (
    FEATHER,
    REFINER_START,
    STRENGTH,
    Number,
    Pair,
    Settings,
    Shape,
    hand_over,
    real,
    resolve,
    texts,
    whole,
)
from sdjax.pipeline.run import Job, Model, Progress, Run, finish
from sdjax.tasks.latent import System
from sdjax.tasks.latent.system import SIZES

OUTPUTS = ("image", "latent")
# Pixels of a batch when the caller does not choose: one picture of 1024 x 1024, four of 512 x 512.
BATCH_PIXELS = 2**20


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
        self.scheduler_config, self.dtype = checkpoint.scheduler, dtype
        self.shape = Shape(
            factor=system.autoencoder.config.factor,
            channels=system.autoencoder.config.latent_channels,
            default=_default_size(checkpoint, system.autoencoder.config.factor),
        )
        self._devices, self._defaults = Devices(mesh), checkpoint.settings
        parts = checkpoint.components
        self.params = {name: part.params for name, part in parts.items()}
        # The checkpoint keeps no second hold of them; `save` takes the parameters from here.
        empty = {name: dataclasses.replace(part, params={}) for name, part in parts.items()}
        self._checkpoint = dataclasses.replace(checkpoint, components=empty)

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Writes a diffusers folder that diffusers itself loads.

        Raises:
            UserError: the folder holds something that sdjax did not write, or a parameter is not finite in `dtype`.
        """
        host = jax.device_get(self._devices.everywhere(self.params))
        parts = {n: dataclasses.replace(self._checkpoint.components[n], params=host[n]) for n in host}
        write_checkpoint(folder, dataclasses.replace(self._checkpoint, components=parts), dtype)

    def settings(self, *, init_image: Pictures | None = None, **given: Any) -> Settings:
        """What a call with these keyword arguments resolves to; see `__call__`.

        Args:
            init_image: has a say in size and strength.
            **given: as there.

        Raises:
            UserError: as `__call__`.
        """
        if given.get("schedule") == "ays" and self.system.numbers:
            given["schedule"] = "ays_sdxl"  # SDXL has levels of its own (Sabour et al. 2024)
        if init_image is not None:
            if given.get("width") is None and given.get("height") is None:
                given["height"], given["width"] = self._size_for(init_image)
            if given.get("strength") is None and self.system.extra != "picture":
                given["strength"] = 1.0 if self.system.extra == "masked" else STRENGTH
        settings = resolve(given, self._defaults, self.scheduler_config, self.shape)
        settings.table(self.scheduler_config)  # which has its own opinion of sampler, schedule and steps
        return settings

    def batch_size(self, images: int, height: int, width: int) -> int:
        """The number of images of each pass when the caller does not say: a power of two that suits their size."""
        shards, fewest = self._devices.shards, self._devices.fewest
        if images <= fewest:
            return fewest
        most = max(1, BATCH_PIXELS // (height * width))
        each = 2 ** (min(-(-images // shards), most) - 1).bit_length()
        return shards * min(each, 2 ** (most.bit_length() - 1))

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
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
        paste: bool = True,
        feather: Number | None = None,
        depth: Pictures | None = None,
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
        tile: int | None = None,
        refiner: Pipeline | None = None,
        refiner_start: Number | None = None,
        first_index: int = 0,
        torch_batch: int | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> Float[np.ndarray, "n H W c"]:
        """Makes pictures: `num_images` of the first prompt, then of the next.

        None means what the checkpoint says: its own defaults, its scheduler config, the size it was trained on.

        Args:
            prompts: one or several, in A1111's syntax: (word:1.2), [word], BREAK; longer ones are read in chunks.
            negative_prompt: one for all, or one a prompt: what guidance leads away from. None is "", or for SDXL's
                base the zeros that it was trained with; so it is for each prompt of a list.
            steps: of the sampler; some call the network more than once a step (see `make_table`).
            sampler: a key of `sdjax.diffusion.samplers.SAMPLERS`.
            schedule: one of its SPACINGS, e.g. trailing or karras.
            guidance_scale: of classifier-free guidance; 1 or less is none.
            seed: 0 to 2^32 - 1; with an image's index it decides all its noise, whatever the batch and the devices.
            width: in pixels; a multiple of `shape.factor`. Where neither is given, pictures have the size of the given
                one, cut to a multiple, an upscaler's `shape.factor` times its size.
            height: in pixels, likewise.
            num_images: of each prompt.
            latents: standard normal first noise of all images, before any scaling; by itself it decides the size.
            init_image: a picture to begin from, one for all or one a prompt, see `load_pictures`; an upscaler's small
                one.
            strength: in (0, 1], the share of the steps that the given picture goes through; None is 0.75, and 1 for
                inpainting models.
            mask: white where the given picture is painted anew, the rest is kept; see `load_masks`.
            paste: outside of the mask put back the given picture's own pixels, exactly; False for what the autoencoder
                makes of them.
            feather: pixels within the mask over which the given picture then fades out; None is 4.
            depth: for depth models, a depth map of the picture to be made, near as bright; see `load_depth`.
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
            tile: the autoencoder works in tiles of so many pixels where a side is longer, so that large pictures fit
                in memory; None is 1536, 0 none.
            refiner: a pipeline that takes over the noisy latents, from the share `refiner_start` of the levels on.
            refiner_start: in (0, 1); None is 0.8.
            first_index: the first image's index: with first_index=5 it is the sixth of a call without.
            torch_batch: with rng="torch", how many images the batch has that PyTorch draws for; None for those up to
                this call's last.
            batch_size: images of one pass, a multiple of the mesh's data x fsdp devices or half of them, which guidance
                doubles; the last pass is filled up, so that with a fixed one any number of prompts compiles once.
            progress: told of every network call.
            dry_run: check all that can be checked before the networks run, and make nothing.

        Returns:
            float32 [n, height, width, 3] in [0, 1], or the latents [n, h, w, z]; [0] for a dry run.

        Raises:
            UserError: an argument is not what it should be, or a stage's output is not finite.
        """
        if output not in OUTPUTS:
            raise unknown("output", output, OUTPUTS)
        given, kind = Given(init_image, mask, depth), self.system.extra
        check_given(kind, given)
        self._check_used(
            given,
            refiner,
            strength=strength,
            feather=feather,
            refiner_start=refiner_start,
            noise_level=noise_level,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
        )
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
            strength=strength,
            syntax=syntax,
            clip_skip=clip_skip,
            rng=rng,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            noise_level=noise_level,
            tile=tile,
            init_image=init_image,
        )
        size = (settings.height, settings.width)
        batch = self.batch_size(len(prompted), *size) if batch_size is None else whole("batch_size", batch_size)
        if self._devices.mesh is not None and batch != self._devices.fewest:
            check_batch(batch, self._devices.mesh, "batch_size")
        faded = real("feather", FEATHER if feather is None else feather, 0.0)
        first = whole("first_index", first_index, 0, 2**31 - 1 - len(prompted))
        indices = np.arange(first, first + len(prompted), dtype=np.int32)
        count = len(prompted) // num_images
        inputs = load_inputs(self.system.extra, given, count, size, self.shape).spread(count, num_images)
        read = self._read(prompted, negatives, settings)
        runs = [Run(self._model, self._job(read, negatives, settings, indices, inputs), self._table(settings))]
        if refiner is not None:
            refiner._check_refines(self)
            job = refiner._job(refiner._read(prompted, negatives, settings), negatives, settings, indices, inputs)
            base, rest = hand_over(
                settings, self.scheduler_config, REFINER_START if refiner_start is None else refiner_start
            )
            runs = [runs[0]._replace(table=base), Run(refiner._model, job, rest, part=1)]
        if dry_run:
            return np.zeros(0, np.float32)
        tell(read.reports)
        last = first + len(prompted)
        total = last if torch_batch is None else whole("torch_batch", torch_batch, last)
        pictures = count_of(given, count, -(-total // num_images))
        runs = self._with_noises(runs, settings, latents, pictures, total)
        with self._devices.working():
            images = finish(runs, settings, batch, output == "image", progress)
        if output == "latent" or inputs.mask is None or inputs.pictures is None or not paste:
            return images
        return paste_back(images, inputs.pictures / 2.0 + 0.5, inputs.mask, faded)

    @property
    def _model(self) -> Model:
        low_resolution = self._checkpoint.low_res_scheduler
        return Model(self.name, self.dtype, self.system, self.params, self.shape, self._devices, low_resolution)

    def _table(self, settings: Settings) -> Table:
        return settings.table(self.scheduler_config)

    def _size_for(self, init_image: Pictures) -> tuple[int, int]:
        """Height and width of what is made of a picture."""
        factor, size = self.shape.factor, size_of(init_image)
        if self.system.extra == "picture":
            return size[0] * factor, size[1] * factor
        height, width = (max(side // factor, 1) * factor for side in size)
        return height, width

    def _check_used(self, given: Given, refiner: Pipeline | None, **arguments: Any) -> None:
        """Refuses arguments that would change nothing."""
        upscaler = self.system.extra == "picture"
        needs = {
            "strength": ("an init_image", given.init_image is not None and not upscaler),
            "feather": ("a mask", given.mask is not None),
            "refiner_start": ("a refiner", refiner is not None),
            "noise_level": ("an upscaler", upscaler),
            **dict.fromkeys(("original_size", "crop", "target_size"), ("an SDXL model", self.system.numbers > 0)),
        }
        for name, value in arguments.items():
            needed, there = needs[name]
            if value is not None and not there:
                raise UserError(f"{name} {value!r} changes nothing without {needed}; leave it out")

    def _check_refines(self, base: Pipeline) -> None:
        """Refuses a refiner that cannot go on with the latents of `base`."""
        mine, other = ((pipe.shape.factor, pipe.shape.channels) for pipe in (self, base))
        if self.system.extra != "nothing" or mine != other:
            raise UserError(f"{self.name} cannot refine what {base.name} makes: it takes other latents, or more")

    def _read(self, prompts: list[str], negatives: list[str | None], settings: Settings) -> Prompts:
        return read_prompts(self.tokenizers, prompts, [text or "" for text in negatives], settings.syntax)

    def _job(
        self, read: Prompts, negatives: list[str | None], settings: Settings, indices: np.ndarray, inputs: Inputs
    ) -> Job:
        numbers = [settings.numbers(self.system.numbers, negative) for negative in (False, True)]
        rows = [None if n is None else np.tile(np.asarray(n, np.float32), (len(negatives), 1)) for n in numbers]
        zeros = self._checkpoint.model_index.get("force_zeros_for_empty_prompt", self.system.numbers == SIZES)
        share = np.array([0.0 if text is None and zeros else 1.0 for text in negatives], np.float32)
        return Job(read.text, read.negative, share, rows[0], rows[1], read.lengths, indices, Noises(), inputs)

    def _with_noises(
        self, runs: list[Run], settings: Settings, latents: np.ndarray | None, pictures: int, batch: int
    ) -> list[Run]:
        """The runs with noise from outside: given first noise, or PyTorch's."""
        job = runs[0].job
        noises = [Noises() for _ in runs]
        if settings.rng == "torch":
            small, masked = job.inputs.small, job.inputs.mask is not None
            # diffusers encodes a picture once however many images are made of it; an inpainting model's not at all
            # where nothing of it is left.
            unseen = masked and settings.strength == 1.0 and self.system.extra == "masked"
            draws = Draws(
                picture=None if small is None else small.shape[1:],
                posteriors=0 if job.inputs.pictures is None or unseen else pictures,
                masked=pictures if masked else 0,
            )
            images = range(int(job.indices[0]), int(job.indices[-1]) + 1)
            shape = self.shape.latents(settings.height, settings.width)
            noises = torch_noises(settings.seed, images, batch, shape, [run.table for run in runs], draws)
        if latents is not None:
            noises[0] = noises[0]._replace(first=latents)
        return [run._replace(job=run.job._replace(noises=own)) for run, own in zip(runs, noises, strict=True)]

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


def _default_size(checkpoint: Checkpoint, factor: int) -> tuple[int, int]:
    """Height and width in pixels; diffusers keeps them as the UNet's sample_size, 64 where it says nothing."""
    size = checkpoint.components["unet"].extra.get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height * factor, width * factor
