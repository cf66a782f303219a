"""The device half of sampling: rows in batches through every stage, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError
from sdjax.core.prng import seed_words
from sdjax.core.tree import Params, merge, unflatten
from sdjax.data.image_inputs import paste_back, resize_lanczos
from sdjax.diffusion.samplers import batched, network_calls
from sdjax.diffusion.samplers.scan import State
from sdjax.diffusion_model import sampling
from sdjax.diffusion_model.conditioner import STATES
from sdjax.diffusion_model.conditioners.lora import TEXT_SCALES, UNET_SCALES
from sdjax.diffusion_model.sampling import Guidance, SamplingBatch, Start
from sdjax.diffusion_model.tiles import Coder, decode_tiled, encode_tiled
from sdjax.models.lora import strip_factors
from sdjax.parallel.sharding import check_batch
from sdjax.pipeline.cascade import next_stage
from sdjax.pipeline.noise import GIVEN, MASKED, TorchRow
from sdjax.pipeline.options import Progress
from sdjax.pipeline.prepare import Part, Row

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline

# Pixels of a batch when the caller does not choose: one image of 1024 x 1024, four of 512 x 512.
BATCH_PIXELS = 2**20


def run(
    pipe: Pipeline,
    rows: Sequence[Row],
    batch_size: int | None = None,
    progress: Progress | None = None,
    *,
    decoded: bool = True,
    rows_per_call: int = 1,
    every_stage: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Images of rows as they are made: (place in `rows`, [H W 3] in [0, 1], or unscaled latents).

    Rows with the same programs share batches, whatever their prompts, seeds, samplers and guidance.

    Args:
        pipe: that prepared the rows.
        rows: of `prepare`, of one call or of several.
        batch_size: images of one pass; None suits their size. The last batch is filled up, so that any number of
            images compiles once.
        progress: called after every call of the compiled loop with the network calls so far and those of all rows.
        decoded: whether to make images of the latents.
        rows_per_call: rows of the tables that one call of the compiled loop runs; between two calls a keyboard
            interrupt is answered. The images are the same to the bit.
        every_stage: whether in place of an image there are those of all stages of a cascade, in their order.

    Raises:
        UserError: a batch size that the devices do not divide, or a stage's output is not finite.
    """
    batches = list(split(pipe, rows, batch_size))
    total = sum(_calls([rows[i] for i in places]) for places, _ in batches)
    done = 0
    for places, batch in batches:
        filled = [rows[places[min(i, len(places) - 1)]] for i in range(batch)]

        def report(calls: int, before: int = done) -> None:
            if progress is not None:
                progress(before + calls, total)

        with pipe.devices.mesh_context():
            stages = _run_batch(pipe, filled, report, decoded, rows_per_call)
        done += _calls(filled)
        yield from zip(places, zip(*stages, strict=True) if every_stage else stages[-1], strict=False)


def split(pipe: Pipeline, rows: Sequence[Row], batch_size: int | None = None) -> Iterator[tuple[list[int], int]]:
    """Batches of rows that share their programs, as (places in `rows`, batch size).

    Within a batch the number of network calls is the largest of its rows, so rows with equal numbers are put together.
    """
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.compile_keys, row.calls), []).append(place)
    for places in groups.values():
        row = rows[places[0]]
        size = batch_size or default_batch_size(pipe, len(places), row.last)
        if pipe.devices.mesh is not None and size != pipe.devices.min_batch:
            check_batch(size, pipe.devices.mesh, "batch_size")
        for first in range(0, len(places), size):
            yield places[first : first + size], size


def default_batch_size(pipe: Pipeline, images: int, row: Row) -> int:
    """Images of each pass when the caller does not say: a power of two that suits their size."""
    height, width = row.size
    shards, fewest = pipe.devices.shards, pipe.devices.min_batch
    if images <= fewest:
        return fewest
    most = max(1, BATCH_PIXELS // (height * width))
    each = 2 ** (min(-(-images // shards), most) - 1).bit_length()
    return shards * min(each, 2 ** (most.bit_length() - 1))


def _calls(rows: Sequence[Row]) -> int:
    """Network calls of a batch, which goes on until its last row is done."""
    own = sum(max(network_calls(row.parts[i].table) for row in rows) for i in range(len(rows[0].parts)))
    following = [row.following for row in rows if row.following is not None]
    return own + (_calls(following) if following else 0)


def _run_batch(
    pipe: Pipeline, rows: Sequence[Row], report: Callable[[int], None], decoded: bool, rows_per_call: int
) -> list[list[np.ndarray]]:
    """Images of each stage of a cascade; of a model alone there is one."""
    latents, done = None, 0
    models = [pipe, pipe.refiner][: len(rows[0].parts)]
    for part, one in enumerate(models):
        assert one is not None, "prepared with a refiner"
        latents, calls = _sample_part(
            one, rows, part, latents, lambda n, before=done: report(before + n), rows_per_call
        )
        done += calls
    last = models[-1]
    assert last is not None
    assert latents is not None
    if not decoded and rows[0].then is None:
        return [list(np.asarray(last.devices.all_gather(latents)) / np.float32(last.model.scale))]
    images = finish(last, rows, latents)
    seconds = [second for row, image in zip(rows, images, strict=True) if (second := second_pass(row, image))]
    if seconds:
        return _run_batch(pipe, seconds, lambda n: report(done + n), decoded, rows_per_call)
    stages = [stage for row, image in zip(rows, images, strict=True) if (stage := next_stage(pipe, row, image))]
    if not stages:
        return [images]
    then, following = stages[0][0], [row for _, row in stages]
    return [images, *_run_batch(then, following, lambda n: report(done + n), decoded, rows_per_call)]


def finish(pipe: Pipeline, rows: Sequence[Row], latents: jax.Array) -> list[Float[np.ndarray, "H W 3"]]:
    """Images in [0, 1] of the last model's scaled latents, with what a mask keeps of given images."""
    return [_paste(row, image) for row, image in zip(rows, decode(pipe, latents, rows[0].tile), strict=True)]


def second_pass(row: Row, image: Float[np.ndarray, "H W 3"]) -> Row | None:
    """The pass over a finished image, enlarged; None where there is none."""
    return row.second and row.second._replace(image=resize_lanczos(image, row.second.size))


def start(
    pipe: Pipeline, rows: Sequence[Row], number: int = 0, noisy: jax.Array | None = None
) -> tuple[Params, SamplingBatch, State]:
    """All that the rows of a model's table need: its parameters, what the loop reads, and its first state.

    Args:
        pipe, rows: the model and images that share its programs.
        number: of the model among those that make an image, see `Row.parts`.
        noisy: scaled latents of the model before, which this one goes on with.

    Raises:
        UserError: a condition or the encoding of a given image is not finite.
    """
    model, devices, parts = pipe.model, pipe.devices, [row.parts[number] for row in rows]
    params = _params(pipe, parts)
    seeds = seed_words([row.seed for row in rows])
    indices = np.array([row.index for row in rows], np.int32)
    guidance = Guidance(*np.array([row.guidance for row in rows], np.float32).T)
    tables = batched([part.table for part in parts])
    seeds, indices, guidance, tables = devices.shard_batch((seeds, indices, guidance, tables))
    shape = model.latent_shape(rows[0].size)
    keys, noise = sampling.draw_noise(seeds, indices, shape, devices.replicate(np.int32(number)))
    if number == 0 and rows[0].latents is not None:
        noise = devices.shard_batch(np.stack([np.asarray(row.latents) for row in rows]))
    elif number == 0 and rows[0].torch is not None:
        noise = _torch_noise(pipe, rows, TorchRow.first)
    cond, columns = _condition(pipe, params, rows, number, keys, guidance)
    schedules = [part.schedule for part in parts]  # all have one, or none has
    schedule = devices.shard_batch(jax.tree.map(lambda *each: np.stack(each), *schedules))
    begin, state = _start(pipe, rows, noise, tables, keys)
    if noisy is not None:
        state = sampling.init_state(noisy)
    steps = _torch_noise(pipe, rows, lambda row: row.steps(number))
    return params, SamplingBatch(tables, cond, columns, guidance, keys, begin, steps, schedule), state


def _sample_part(
    pipe: Pipeline,
    rows: Sequence[Row],
    number: int,
    noisy: jax.Array | None,
    report: Callable[[int], None],
    rows_per_call: int,
) -> tuple[jax.Array, int]:
    """Scaled latents after one model's rows, from `noisy` latents of the model before where there is one."""
    params, batch, state = start(pipe, rows, number, noisy)
    table = rows[0].parts[number].table
    calls = max(network_calls(row.parts[number].table) for row in rows)

    def settle(first: int, last: int, finite: jax.Array) -> None:
        which = f"network call {last}" if last - first == 1 else f"network calls {first + 1} to {last}"
        timestep = table.timestep[min(first, network_calls(table) - 1)]
        place = f"{which} of {calls} (timestep {timestep:g}, guidance scale {rows[0].guidance[0]:g})"
        check_finite(pipe, finite, f"the UNet's output at {place}")
        report(last)

    running = []
    for first in range(0, calls, rows_per_call):
        last = min(first + rows_per_call, calls)
        state, finite = sampling.sample(pipe.model, params, batch, state, np.int32(first), np.int32(last))
        # The call before is waited for while this one runs, so that devices never wait for the host.
        for call in running:
            settle(*call)
        running = [(first, last, finite)]
    settle(*running[0])
    return state.x, calls


def _params(pipe: Pipeline, parts: Sequence[Part]) -> Params:
    """Parameters for a batch whose parts have equal columns of those that images share.

    Where no LoRA acts on any image there are no factors, so that the program and each bit are those of the base. Images
    that were prepared before the first one was loaded have no strengths.
    """
    strengths = [part.columns.get(name, 0.0) for part in parts for name in (TEXT_SCALES, UNET_SCALES)]
    if pipe.loras and not any(map(np.any, strengths)):
        return strip_factors(pipe.params)
    part = parts[0]
    shared = {name: pipe.devices.replicate(part.columns[name]) for name in part.shared if name in part.columns}
    if not shared:
        return pipe.params
    return merge(pipe.params, unflatten(sampling.change_weights(pipe.model, pipe.params, shared)))


def check_finite(pipe: Pipeline, finite: Any, stage: str) -> None:
    """Hold a stage to finite values; a UserError names the one whose values are not."""
    if not finite:
        hint = "" if pipe.dtype == "float32" else f"; {pipe.dtype} may be too narrow, try float32"
        raise UserError(f"{stage} is not finite: the weights of {pipe.name} hold values that overflow{hint}")


def _condition(
    pipe: Pipeline, params: Params, rows: Sequence[Row], number: int, keys: jax.Array, guidance: Guidance
) -> tuple[Any, Any]:
    model, parts = pipe.model, [row.parts[number] for row in rows]
    columns = pipe.devices.shard_batch(
        {name: np.stack([part.columns[name] for part in parts]) for name in parts[0].columns}
    )
    columns |= _states(pipe, params, parts)
    for name, images in model.conditioner.images_to_encode(columns).items():
        moments = encode(pipe, images, rows[0].tile, "masked image")
        if model.conditioner.traits.draws_latents:
            columns[name] = _drawn(pipe, rows, moments, keys, MASKED)
        else:
            columns[name] = jnp.split(moments, 2, axis=-1)[0]
    how = {"guided": parts[0].guided, "scheduled": parts[0].schedule is not None}
    cond, shown, finite = sampling.condition(model, params, columns, keys, guidance, **how)
    check_finite(pipe, finite, "the text encoder's output" if "prompt" in pipe.inputs else "the condition")
    return cond, shown


def _states(pipe: Pipeline, params: Params, parts: Sequence[Part]) -> dict[str, jax.Array]:
    """States of text columns, each text encoded once as long as the pipeline lives; {} where LoRAs may change them."""
    if pipe.loras:
        return {}

    def encode(tokens: np.ndarray) -> np.ndarray:
        states = sampling.encode_text(pipe.model, params, pipe.devices.replicate(tokens[None]))
        return np.asarray(pipe.devices.all_gather(states))[0]

    names = pipe.model.conditioner.traits.text_columns
    rows = {name: [pipe.states.get(part.columns[name], encode) for part in parts] for name in names}
    return {name + STATES: pipe.devices.shard_batch(np.stack(each)) for name, each in rows.items()}


def _start(pipe: Pipeline, rows: Sequence[Row], noise: jax.Array, tables: Any, keys: jax.Array) -> tuple[Start, Any]:
    """Pure noise, or given images with some."""
    model, devices = pipe.model, pipe.devices
    h, w, z = model.latent_shape(rows[0].size)
    if rows[0].image is None:
        known = devices.shard_batch(np.zeros((len(rows), h, w, z), np.float32))
    else:
        images = np.stack([np.asarray(row.image, np.float32) for row in rows]) * np.float32(2.0) - np.float32(1.0)
        known = _drawn(pipe, rows, encode(pipe, images, rows[0].tile, "given image"), keys, GIVEN)
    anew = np.ones((len(rows), h, w, 1), np.float32)
    for mask, row in zip(anew, rows, strict=True):
        if row.blend and row.mask is not None:
            mask[...] = row.mask[:: model.factor, :: model.factor]
    anew, fresh = devices.shard_batch((anew, np.array([row.fresh for row in rows])))
    begun = known if all(row.content is None for row in rows) else _exchanged(pipe, rows, known, noise)
    state, begin = sampling.start_state(tables, noise, begun, fresh), Start(known, noise, anew)
    if model.conditioner.traits.keeps_clean and any(row.blend for row in rows):
        state = sampling.clean_state(tables, state, begin)
    return begin, state


def _exchanged(pipe: Pipeline, rows: Sequence[Row], known: jax.Array, noise: jax.Array) -> jax.Array:
    """The known latents, of rows that have it so with noise or nothing in their place under the mask."""
    mask = np.zeros((*known.shape[:-1], 1), np.float32)
    factor = np.array([row.content or 0.0 for row in rows], np.float32)
    for own, row in zip(mask, rows, strict=True):
        if row.content is not None and row.mask is not None:
            own[...] = row.mask[:: pipe.model.factor, :: pipe.model.factor]
    return sampling.exchange(known, noise, *pipe.devices.shard_batch((mask, factor)))


def _drawn(pipe: Pipeline, rows: Sequence[Row], moments: jax.Array, keys: jax.Array, stream: int) -> jax.Array:
    """Latents drawn from the moments of `encode`."""
    noise = _torch_noise(pipe, rows, lambda row: row.encoded(stream))
    return sampling.draw_latents(moments, keys, pipe.devices.replicate(np.int32(stream)), noise)


def _torch_noise(pipe: Pipeline, rows: Sequence[Row], draw: Callable[[TorchRow], np.ndarray | None]) -> Any:
    """Noise that PyTorch draws for each row; None where rows have noise of their own, or nothing is drawn."""
    drawn = [noise for row in rows if row.torch is not None and (noise := draw(row.torch)) is not None]
    return pipe.devices.shard_batch(np.stack(drawn)) if drawn else None


def _paste(row: Row, image: np.ndarray) -> np.ndarray:
    if row.paste is None or row.image is None or row.mask is None:
        return image
    return paste_back(image, row.image, row.mask, row.paste)


def encode(pipe: Pipeline, images: Any, tile: int, name: str) -> jax.Array:
    """Mean and standard deviation of scaled latents of images in [-1, 1], all finite.

    They are encoded in tiles where a side is longer than `tile` pixels.
    """
    coder, checks = _checked(sampling.encode, pipe)
    factor = pipe.model.factor
    side, overlap = _tiling(tile, factor, images.shape[1:3])
    moments = encode_tiled(coder, pipe.devices.shard_batch(images), side, overlap, factor)
    check_finite(pipe, all(checks), f"the autoencoder's encoding of the {name}")
    return moments


def decode(pipe: Pipeline, latents: jax.Array, tile: int) -> Float[np.ndarray, "b H W c"]:
    """Images in [0, 1] of scaled latents, all finite, in tiles where a side would be longer than `tile` pixels."""
    coder, checks = _checked(sampling.decode, pipe)
    factor = pipe.model.factor
    size = latents.shape[1] * factor, latents.shape[2] * factor
    images = decode_tiled(coder, latents, *_tiling(tile, factor, size), factor)
    check_finite(pipe, all(checks), "the decoded image")
    return np.asarray(pipe.devices.all_gather(images))


def _checked(stage: Callable[..., tuple[jax.Array, jax.Array]], pipe: Pipeline) -> tuple[Coder, list[jax.Array]]:
    """A stage for one tile, and its answers whether all is finite."""
    checks: list[jax.Array] = []

    def coder(values: jax.Array) -> jax.Array:
        made, finite = stage(pipe.model, pipe.params, values)
        checks.append(finite)
        return made

    return coder, checks


def _tiling(tile: int, factor: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Side and overlap of tiles in latents; 0 pixels are no tiles. Pixels themselves need none."""
    side = max(1, tile // factor) if tile and factor > 1 else max(size) // factor
    return side, side // 4
