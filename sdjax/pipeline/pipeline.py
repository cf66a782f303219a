"""A model that is called with prompts or other conditions and answers with images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sdjax.checkpoints.checkpoint import ADDITIONS, Checkpoint, LoadedLora
from sdjax.checkpoints.layouts.diffusers import check_target_folder, write_checkpoint
from sdjax.checkpoints.lora.patch import add_loras
from sdjax.checkpoints.mapping import Put
from sdjax.core.errors import UserError
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.diffusion.samplers import SamplerTable, network_calls
from sdjax.diffusion_model.conditioner import Host
from sdjax.diffusion_model.conditioners.text import TextConditioner
from sdjax.diffusion_model.model import DiffusionModel, build_model
from sdjax.models.autoencoder import AnyAutoencoder, has_same_scale
from sdjax.models.lora import strip_factors
from sdjax.parallel.sharding import sharded_put
from sdjax.pipeline.cascade import check_follows
from sdjax.pipeline.devices import Devices
from sdjax.pipeline.execute import run
from sdjax.pipeline.options import Options, Progress
from sdjax.pipeline.prepare import Row, prepare
from sdjax.pipeline.text_states import TextStates


class Pipeline:
    """A diffusion model and how to sample it; made by `sdjax.load`.

    Attributes:
        name: of the checkpoint.
        model: the networks.
        params: by component, e.g. {"unet": ..., "vae": ..., "text_encoder": ...}, on the devices.
        tokenizers: by text encoder.
        scheduler: scheduler_config.json: how its training noised, and its own sampler.
        settings: how the checkpoint is best sampled, and facts of its condition, e.g. names of classes.
        refiner: another pipeline that takes over the last noise levels; None without one.
        dtype: of the arithmetic of backbone and text encoders.
        devices: where its arrays go.
        lora_dir: folder of LoRAs that prompts may name; None without one.
        then: the next stage of a cascade, which goes on with the images; None without one.
        states: of texts that were encoded already.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        model: DiffusionModel,
        tokenizers: Mapping[str, Tokenizer],
        dtype: str = "float32",
        mesh: Mesh | None = None,
        refiner: Pipeline | None = None,
        lora_dir: Path | None = None,
        then: Pipeline | None = None,
    ) -> None:
        """Take a checkpoint whose parameters are on the devices already.

        Raises:
            UserError: the refiner cannot go on with this model's latents, or the next stage not with its images.
        """
        self.name, self.model, self.tokenizers, self.dtype = name, model, tokenizers, dtype
        self.scheduler, self.settings = checkpoint.scheduler, dict(checkpoint.settings)
        if checkpoint.low_res_scheduler is not None:
            self.settings["low_res_scheduler"] = checkpoint.low_res_scheduler
        self.devices = Devices(mesh)
        self.params = {n: dict(part.params) for n, part in checkpoint.components.items()}
        # The checkpoint keeps no second hold of them; `save` takes the parameters from here.
        empty = {n: dataclasses.replace(part, params={}) for n, part in checkpoint.components.items()}
        self.checkpoint = dataclasses.replace(checkpoint, components=empty)
        if refiner is not None:
            theirs, own = ((pipe.model.factor, pipe.model.channels) for pipe in (refiner, self))
            if refiner.model.conditioner.traits.concat_channels or theirs != own:
                raise UserError(f"{refiner.name} cannot refine what {name} makes: it takes other latents, or more")
            if not has_same_scale(refiner.model.scale, model.scale):
                scales = f"are scaled by {refiner.model.scale:g}, not {model.scale:g}"
                raise UserError(f"{refiner.name} cannot refine what {name} makes: the latents that it knows {scales}")
        self.refiner, self.lora_dir, self.then = refiner, lora_dir, then
        self.states = TextStates()
        if then is not None:
            check_follows(self, then)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Options of a call that its condition reads."""
        return self.model.conditioner.traits.inputs

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images it was trained on."""
        return self.checkpoint.default_size

    @property
    def begins_from_images(self) -> bool:
        """True if sampling begins at an init_image, which is then not a condition alone."""
        return self.model.conditioner.traits.strength is not None

    @property
    def is_distilled(self) -> bool:
        """True if the backbone imitates guidance, whose scale it is conditioned on."""
        return self.model.config.guidance_dim is not None

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """Files of LoRA that were loaded and not merged."""
        return self.checkpoint.loras

    @property
    def controlnets(self) -> tuple[str, ...]:
        """Names of the ControlNets that were loaded, in the order of their hints."""
        return self.checkpoint.controlnets

    @property
    def later(self) -> tuple[Pipeline, ...]:
        """The later stages of a cascade, in their order."""
        return () if self.then is None else (self.then, *self.then.later)

    @property
    def text(self) -> TextConditioner:
        """The conditioner of prompts; one without encoders for models that take none."""
        parts = getattr(self.model.conditioner, "parts", (self.model.conditioner,))
        return next((part for part in parts if isinstance(part, TextConditioner)), TextConditioner())

    @property
    def autoencoder(self) -> AnyAutoencoder:
        """The model's autoencoder; a UserError where it diffuses pixels."""
        if self.model.autoencoder is None:
            raise UserError(f"{self.name} diffuses pixels, and has no autoencoder")
        return self.model.autoencoder

    def host(self, size: tuple[int, int], table: SamplerTable, total: int = 0) -> Host:
        """Facts for encoding conditions of images of this height and width, sampled by a table."""
        latents, rows = self.model.latent_shape(size)[:2], len(table.sigma)
        return Host(self.name, self.settings, self.tokenizers, size, latents, rows, network_calls(table), total)

    def add_loras(self, files: Sequence[tuple[Path, float]]) -> None:
        """Load further LoRAs, at strengths for calls that name none; what was prepared before has none of them.

        Raises:
            UserError: a file cannot be read, or is for another base.
        """
        mesh = self.devices.mesh
        place: Put = (lambda array, name: jax.device_put(array)) if mesh is None else sharded_put(mesh)
        parts = {n: dataclasses.replace(part, params=self.params[n]) for n, part in self.checkpoint.components.items()}
        patched = add_loras(files, place)(dataclasses.replace(self.checkpoint, components=parts))
        self.params = {name: dict(part.params) for name, part in patched.components.items()}
        self.checkpoint = dataclasses.replace(self.checkpoint, loras=patched.loras)
        self.model = build_model(self.checkpoint, self.tokenizers, self.model.backbone.dtype, self.name)

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a folder that diffusers loads, where it has a class for the model.

        Adapters that were added stay out, and so do LoRAs that are not merged.

        Raises:
            UserError: the folder holds something that sdjax did not write, or a parameter is not finite in `dtype`.
        """
        check_target_folder(Path(folder).resolve())
        own = {n: part for n, part in self.checkpoint.components.items() if not n.startswith(ADDITIONS)}
        host = jax.device_get(self.devices.all_gather(strip_factors({n: self.params[n] for n in own})))
        parts = {n: dataclasses.replace(part, params=host[n]) for n, part in own.items()}
        write_checkpoint(folder, dataclasses.replace(self.checkpoint, components=parts), dtype)

    def prepare(
        self,
        prompts: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        **options: Unpack[Options],
    ) -> list[Row]:
        """Rows of a call, one an image; see `__call__`, whose errors it raises before any network runs."""
        return prepare(self, prompts, negative_prompt, options)

    def run(
        self, rows: Sequence[Row], batch_size: int | None = None, progress: Progress | None = None, **how: Any
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Images of prepared rows as they are made; see `sdjax.pipeline.execute.run`."""
        return run(self, rows, batch_size, progress, **how)

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        **options: Unpack[Options],
    ) -> Float[np.ndarray, "n H W c"]:
        """Sample images: `num_images` of the first prompt, then of the next.

        None means what the checkpoint says: its own defaults, its scheduler config, the size it was trained on. Inputs
        such as `init_image` or `class_label` are one for all or one a prompt.

        Args:
            prompts: one or several, in A1111's syntax: (word:1.2), [word], BREAK, [from:to:when], [a|b] and AND (see
                `sdjax.data.text.prompt_editing`); {a|b} and __name__ draw words for each image (see
                `sdjax.data.text.wildcards`); <lora:name:0.8> is the strength of a LoRA (see
                `sdjax.data.text.lora_tags`); longer ones are read in chunks. None for a model that takes none.
            negative_prompt: one for all, or one a prompt: what guidance leads away from. None is "", or for SDXL's
                base the zeros that it was trained with.
            options: rows of `sdjax.pipeline.options.Options`. A list in `control_image`, `control_scale`,
                `control_start` and `control_end` has an entry for each of the loaded ControlNets, in `t2i_image` and
                `t2i_scale` for each of the T2I-Adapters, and in `ip_image` all images of a prompt. For each prompt
                images of its own are a list of such lists, [[a], [b]].

        Returns:
            float32 [n, height, width, 3] in [0, 1], or unscaled latents [n, h, w, z] for output="latent"; for
            output="stages" a list of the former, one a stage of the cascade.

        Raises:
            UserError: an option is not what it should be or has no effect, or a stage's output is not finite.
        """
        rows = self.prepare(prompts, negative_prompt, **options)
        how = {"decoded": options.get("output") != "latent", "every_stage": options.get("output") == "stages"}
        made = dict(self.run(rows, options.get("batch_size"), options.get("progress"), **how))
        images = [made[place] for place in range(len(rows))]
        if how["every_stage"]:
            return cast(Any, [np.stack(stage) for stage in zip(*images, strict=True)])
        return np.stack(images)
