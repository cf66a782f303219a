"""Parts to be timed: one call of the UNet, one of the decoder, or the whole pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.against_diffusers import decoder_call, pipeline_call, unet_call
from benchmarks.measuring import Call
from benchmarks.work import GUIDANCE, PROMPT, TOKENS, Work
from sdjax.core.compilation import jit
from sdjax.models.conditioning import Cond, apply
from sdjax.pipeline.pipeline import Pipeline
from sdjax.plan import flops
from sdjax.plan.programs import Program
from sdjax.plan.sampling import Wanted, sampling_programs
from sdjax.plan.variants import Shaped


class TimedModel(NamedTuple):
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
    images: int
    network_seconds: Callable[[float], float | None]
    programs: Callable[[Mesh], list[Program]]


def unet_subject(pipe: Pipeline, work: Work) -> TimedModel:
    """One call of the UNet on `work.batch` latents."""
    x, t, cond = inputs = work.devices.shard_batch(unet_inputs(pipe, work.size, work.batch))

    def unet(params: Any, x: Any, t: Any, cond: Cond) -> Any:
        return apply(pipe.model.backbone, params, x, t, cond)

    compiled = jit(unet)

    def ours() -> Any:
        with work.devices.mesh_context():
            return jax.block_until_ready(compiled(pipe.params["unet"], *inputs))

    def theirs(dtype: str) -> Call:
        return unet_call(pipe, (x, t, cond), dtype)

    return TimedModel(
        ours=ours,
        theirs=theirs,
        compiled=("unet",),
        flops=unet_flops(pipe, work.size, work.batch),
        images=0,
        network_seconds=lambda seconds: seconds,
        programs=lambda mesh: [Program("UNet", unet, (pipe.params["unet"], *inputs))],
    )


def decoder_subject(pipe: Pipeline, work: Work) -> TimedModel:
    """One call of the autoencoder's decoder, in float32 as the pipeline has it."""
    z = work.devices.shard_batch(_noise(work.batch, *pipe.model.latent_shape((work.size, work.size))))

    def decode(params: Any, z: Any) -> Any:
        return apply(pipe.autoencoder, params, z, method="decode")

    compiled = jit(decode)

    def ours() -> Any:
        with work.devices.mesh_context():
            return jax.block_until_ready(compiled(pipe.params["vae"], z))

    def theirs(dtype: str) -> Call:
        del dtype
        return decoder_call(pipe, z)

    return TimedModel(
        ours=ours,
        theirs=theirs,
        compiled=("decode",),
        flops=decoder_flops(pipe, work.size, work.batch),
        images=work.batch,
        network_seconds=lambda seconds: None,
        programs=lambda mesh: [Program("decoder", decode, (pipe.params["vae"], z))],
    )


def pipeline_subject(pipe: Pipeline, work: Work) -> TimedModel:
    """A call of the pipeline: prompts with guidance to images on the host."""
    clock = Clock()
    given: dict[str, Any] = {
        "steps": work.steps,
        "sampler": work.sampler,
        "guidance_scale": GUIDANCE,
        "width": work.size,
        "height": work.size,
    }

    def theirs(dtype: str) -> Call:
        return pipeline_call(pipe, work, dtype)

    def ours() -> Any:
        clock.marks.clear()
        return pipe([PROMPT] * work.batch, "", **given, batch_size=work.batch, progress=clock)

    calls = pipe.prepare(PROMPT, "", **given)[0].calls
    ids = jnp.zeros((2 * work.batch, TOKENS), jnp.int32)
    text = sum(
        flops.count(lambda p, i, e=encoder: e.encode(p, i[:, None]), pipe.params, ids) for encoder in pipe.text.encoders
    )
    network = calls * unet_flops(pipe, work.size, 2 * work.batch)
    return TimedModel(
        ours=ours,
        theirs=theirs,
        compiled=("condition", "sample", "decode"),
        flops=text + network + decoder_flops(pipe, work.size, work.batch),
        images=work.batch,
        network_seconds=lambda seconds: clock.interval(),
        programs=lambda mesh: sampling_programs(_shaped(pipe), Wanted(*work[:4]), mesh),
    )


PARTS: dict[str, Callable[[Pipeline, Work], TimedModel]] = {
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
    config = pipe.model.backbone.config
    height, width, _ = pipe.model.latent_shape((size, size))
    vector = None if config.vector_dim is None else _noise(batch, config.vector_dim)
    guidance = None if config.guidance_dim is None else _noise(batch, config.guidance_dim)
    cond = Cond(context=_noise(batch, TOKENS, config.context_dim or 0), vector=vector, guidance=guidance)
    return _noise(batch, height, width, config.in_channels), jnp.full(batch, 500.0), cond


def unet_flops(pipe: Pipeline, size: int, batch: int) -> int:
    """Seconds of one call on `batch` latents."""
    network = pipe.model.backbone
    return flops.count(lambda p, *rest: apply(network, p, *rest), pipe.params["unet"], *unet_inputs(pipe, size, batch))


def decoder_flops(pipe: Pipeline, size: int, batch: int) -> int:
    """Seconds of decoding `batch` latents."""
    z = jax.ShapeDtypeStruct((batch, *pipe.model.latent_shape((size, size))), jnp.float32)
    return flops.count(lambda p, z: apply(pipe.autoencoder, p, z, method="decode"), pipe.params["vae"], z)


def _shaped(pipe: Pipeline) -> Shaped:
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pipe.params)
    return Shaped(pipe.model, params, dict(pipe.scheduler), pipe.default_size[0])


def _noise(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)
