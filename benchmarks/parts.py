"""What can be timed: one call of the UNet, one of the decoder, or the whole pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.measuring import Call
from sdjax.core.compilation import jit
from sdjax.models.apply import apply
from sdjax.models.conditioning import Cond
from sdjax.pipeline.devices import Devices
from sdjax.pipeline.pipeline import Pipeline
from sdjax.plan import flops
from sdjax.plan.programs import Program
from sdjax.plan.sampling import Wanted, sampling_programs
from sdjax.plan.variants import Shaped

PROMPT = "a photo of a red heart on a wooden table"
GUIDANCE = 7.5
TOKENS = 77


class Work(NamedTuple):
    """What is asked for.

    Attributes:
        size: pixels of a side.
        batch: rows.
        steps: of the sampler.
        sampler: its name, None for the checkpoint's.
        mesh: over which it is spread; None for one device.
    """

    size: int
    batch: int
    steps: int
    sampler: str | None
    mesh: Mesh | None = None

    @property
    def devices(self) -> Devices:
        """Where arrays go."""
        return Devices(self.mesh)


class Subject(NamedTuple):
    """Something to time.

    Attributes:
        ours: makes the call and waits for it.
        theirs: makes the same call in diffusers.
        compiled: the functions that it compiles.
        flops: of matrix products and convolutions in one call.
        pictures: how many a call makes; 0 where it makes none.
        network_seconds: of one call of the UNet, known after `ours`; None where the UNet is not called.
        programs: the same as programs whose communication can be counted, on a mesh.
    """

    ours: Call
    theirs: Callable[[str], Call]
    compiled: tuple[str, ...]
    flops: int
    pictures: int
    network_seconds: Callable[[float], float | None]
    programs: Callable[[Mesh], list[Program]]


def unet_subject(pipe: Pipeline, work: Work) -> Subject:
    """One call of the UNet on `work.batch` latents."""
    x, t, cond = inputs = work.devices.rows(unet_inputs(pipe, work.size, work.batch))

    def unet(params: Any, x: Any, t: Any, cond: Cond) -> Any:
        return apply(pipe.system.unet, params, x, t, cond)

    compiled = jit(unet)

    def ours() -> Any:
        with work.devices.working():
            return jax.block_until_ready(compiled(pipe.params["unet"], *inputs))

    def theirs(dtype: str) -> Call:
        from benchmarks.against_diffusers import unet_call

        return unet_call(pipe, (x, t, cond), dtype)

    return Subject(
        ours=ours,
        theirs=theirs,
        compiled=("unet",),
        flops=unet_flops(pipe, work.size, work.batch),
        pictures=0,
        network_seconds=lambda seconds: seconds,
        programs=lambda mesh: [Program("UNet", unet, (pipe.params["unet"], *inputs))],
    )


def decoder_subject(pipe: Pipeline, work: Work) -> Subject:
    """One call of the autoencoder's decoder, in float32 as the pipeline has it."""
    z = work.devices.rows(_noise(work.batch, *pipe.shape.latents(work.size, work.size)))

    def decode(params: Any, z: Any) -> Any:
        return apply(pipe.system.autoencoder, params, z, method="decode")

    compiled = jit(decode)

    def ours() -> Any:
        with work.devices.working():
            return jax.block_until_ready(compiled(pipe.params["vae"], z))

    def theirs(dtype: str) -> Call:
        del dtype
        from benchmarks.against_diffusers import decoder_call

        return decoder_call(pipe, z)

    return Subject(
        ours=ours,
        theirs=theirs,
        compiled=("decode",),
        flops=decoder_flops(pipe, work.size, work.batch),
        pictures=work.batch,
        network_seconds=lambda seconds: None,
        programs=lambda mesh: [Program("decoder", decode, (pipe.params["vae"], z))],
    )


def pipeline_subject(pipe: Pipeline, work: Work) -> Subject:
    """A call of the pipeline: prompts with guidance to pictures on the host."""
    clock = Clock()
    given: dict[str, Any] = {
        "steps": work.steps,
        "sampler": work.sampler,
        "guidance_scale": GUIDANCE,
        "width": work.size,
        "height": work.size,
    }

    def theirs(dtype: str) -> Call:
        from benchmarks.against_diffusers import pipeline_call

        return pipeline_call(pipe, work, dtype)

    def ours() -> Any:
        clock.marks.clear()
        return pipe([PROMPT] * work.batch, "", **given, batch_size=work.batch, progress=clock)

    table = pipe.settings(**given).table(pipe.scheduler_config)
    calls = int(np.sum(table.active))
    ids = jnp.zeros((2 * work.batch, TOKENS), jnp.int32)
    text = sum(
        flops.count(lambda p, i, e=encoder: apply(e.module, p, i), pipe.params[encoder.name], ids)
        for encoder in pipe.system.text_encoders
    )
    network = calls * unet_flops(pipe, work.size, 2 * work.batch)
    return Subject(
        ours=ours,
        theirs=theirs,
        compiled=("text_stage", "sampling_stage", "decode_stage"),
        flops=text + network + decoder_flops(pipe, work.size, work.batch),
        pictures=work.batch,
        network_seconds=lambda seconds: clock.interval(),
        programs=lambda mesh: sampling_programs(_shaped(pipe), Wanted(*work[:4]), mesh),
    )


PARTS: dict[str, Callable[[Pipeline, Work], Subject]] = {
    "unet": unet_subject,
    "decoder": decoder_subject,
    "pipeline": pipeline_subject,
}


class Clock:
    """A pipeline's progress, which notes when each network call ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def __call__(self, done: int, total: int) -> None:
        del done, total
        self.marks.append(time.perf_counter())

    def interval(self) -> float | None:
        """Seconds from one call's end to the next's; None where there was but one."""
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1) if len(self.marks) > 1 else None


def unet_inputs(pipe: Pipeline, size: int, batch: int) -> tuple[jax.Array, jax.Array, Cond]:
    """Random latents, timesteps and conditions of the shapes that the pipeline's UNet takes."""
    config = pipe.system.unet.config
    height, width, _ = pipe.shape.latents(size, size)
    vector = None if config.vector_dim is None else _noise(batch, config.vector_dim)
    guidance = None if config.guidance_dim is None else _noise(batch, config.guidance_dim)
    cond = Cond(context=_noise(batch, TOKENS, config.context_dim), vector=vector, guidance=guidance)
    return _noise(batch, height, width, config.in_channels), jnp.full(batch, 500.0), cond


def unet_flops(pipe: Pipeline, size: int, batch: int) -> int:
    """Of one call on `batch` latents."""
    network = pipe.system.unet
    return flops.count(lambda p, *rest: apply(network, p, *rest), pipe.params["unet"], *unet_inputs(pipe, size, batch))


def decoder_flops(pipe: Pipeline, size: int, batch: int) -> int:
    """Of decoding `batch` latents."""
    z = jax.ShapeDtypeStruct((batch, *pipe.shape.latents(size, size)), jnp.float32)
    return flops.count(lambda p, z: apply(pipe.system.autoencoder, p, z, method="decode"), pipe.params["vae"], z)


def _shaped(pipe: Pipeline) -> Shaped:
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pipe.params)
    return Shaped(pipe.system, params, dict(pipe.scheduler_config), pipe.shape.default[0])


def _noise(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)
