"""Images that share the calls of one compiled loop, each at a row of its own table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.diffusion.samplers import network_calls
from sdjax.diffusion_model import sampling
from sdjax.diffusion_model.batching import Loop, join, signature, take
from sdjax.pipeline.execute import start
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import Part, Row
from sdjax.serve.jobs import Job

# Of a table, beside what each row has.
PER_IMAGE = ("first_scale", "limits")


class Passage:
    """One image on its way through its models and passes.

    Attributes:
        job, number: whose image it is, and its place in the job.
        row: of the pass that it is in.
        stage, part: of a cascade, and number of the model that it is with.
        noisy: scaled latents of the model before.
        begun: what its loop needs; None until it has been made.
    """

    def __init__(self, job: Job, number: int, row: Row) -> None:
        self.job, self.number, self.row = job, number, row
        self.stage = self.part = 0
        self.noisy: jax.Array | None = None
        self.begun: Begun | None = None

    @property
    def calls(self) -> int:
        """Network calls of this model's share."""
        return network_calls(self.row.parts[self.part].table)


class Seat(NamedTuple):
    """An image and its place in a loop."""

    passage: Passage
    place: int


class Begun:
    """An image before its first row: encoded, and with a loop of its own.

    Attributes:
        model, params, loop: as `start` makes them, with the image in every place.
        key: of images that may share a loop.
    """

    def __init__(self, pipe: Pipeline, passage: Passage, length: int) -> None:
        """Encode the condition and the given image.

        Args:
            pipe: the model of this share.
            passage: the image.
            length: of all tables, so that numbers of steps share a program.

        Raises:
            UserError: a stage's output is not finite.
        """
        row, part = passage.row, passage.row.parts[passage.part]
        if row.torch is None:  # whose noise has a row for each of the table
            part = padded(part, length, pipe.model.conditioner.traits.row_columns)
            parts = list(row.parts)
            parts[passage.part] = part
            row = row._replace(parts=tuple(parts))
        rows = [row] * pipe.devices.min_batch
        with pipe.devices.mesh_context():
            self.params, batch, state = start(pipe, rows, passage.part, passage.noisy)
        self.model, self.loop = pipe.model, Loop(batch, state)
        shared = tuple(part.columns[name].tobytes() for name in part.shared if name in part.columns)
        structure = jax.tree.structure(self.params)
        self.key = pipe, self.model, structure, shared, signature(self.loop)


def padded(part: Part, length: int, row_columns: Sequence[str]) -> Part:
    """A model's share with a table of this length, or its own where that is longer."""

    def pad(values: Any) -> np.ndarray:
        values = np.asarray(values)
        return np.pad(values, [(0, max(length - len(values), 0)), *[(0, 0)] * (values.ndim - 1)])

    changes = {n: pad(v) for n, v in part.table._asdict().items() if v is not None and n not in PER_IMAGE}
    table = part.table._replace(**changes)
    columns = {name: pad(c) if name in row_columns else c for name, c in part.columns.items()}
    schedule = part.schedule
    if schedule is not None:
        schedule = schedule._replace(places=pad(schedule.places))
    return part._replace(table=table, columns=columns, schedule=schedule)


class Lane:
    """A loop and who sits in it.

    Attributes:
        pipe, model, params: that run it; the pipeline may get others while it runs.
        key: of images that may join.
        size: places.
        seats: by place, the image and the row of the loop after its last.
    """

    def __init__(self, pipe: Pipeline, begun: Begun, size: int) -> None:
        """Make a lane for images with the key of `begun`."""
        self.pipe, self.key = pipe, begun.key
        self.model, self.params = begun.model, begun.params
        self.length = begun.loop.batch.tables.sigma.shape[1]
        self.size, self.row = size, 0
        self._loop = self._put(take(begun.loop, np.zeros(size, np.int32)))
        self._waiting: list[Any] = []
        self.seats: dict[int, tuple[Passage, int]] = {}

    def resize(self, size: int) -> None:
        """Change the number of places; all images keep theirs, or get others where these are gone."""
        if size == self.size:
            return
        held = sorted(self.seats)
        places = (held + [0] * size)[:size]
        self._loop = self._put(take(self._loop, np.array(places, np.int32)))
        self.seats = {new: self.seats[old] for new, old in enumerate(held)}
        self.size = size

    def join(self, passage: Passage) -> None:
        """Give an image a free place, from the next row on."""
        assert passage.begun is not None, "an image begins before it joins"
        place = next(place for place in range(self.size) if place not in self.seats)
        at = np.int32(self.row % self.length)
        with self.pipe.devices.mesh_context():
            self._loop = self._put(join(self.model, self._loop, passage.begun.loop, np.int32(place), at))
        self.seats[place] = passage, self.row + passage.calls
        passage.begun = None

    def leave(self, passage: Passage) -> None:
        """Free an image's place."""
        self.seats = {place: seat for place, seat in self.seats.items() if seat[0] is not passage}

    def call(self, rows: int) -> int:
        """Run at most so many rows, none beyond any image's last; return how many."""
        first = self.row % self.length
        rows = min(rows, self.length - first, *(last - self.row for _, last in self.seats.values()))
        with self.pipe.devices.mesh_context():
            state, finite = sampling.sample(
                self.model, self.params, self._loop.batch, self._loop.state, np.int32(first), np.int32(first + rows)
            )
        self._loop = self._put(self._loop._replace(state=state))
        self._waiting.append(finite)
        self.row += rows
        return rows

    def wait(self, ahead: int = 1) -> None:
        """Wait for the devices until they have at most so many calls before them."""
        while len(self._waiting) > ahead:
            self._waiting.pop(0).block_until_ready()

    def arrived(self) -> list[Seat]:
        """Images whose last row is done, which leave."""
        there = [Seat(passage, place) for place, (passage, last) in self.seats.items() if last == self.row]
        for _, place in there:
            del self.seats[place]
        return there

    def latents(self, places: Sequence[int], size: int) -> jax.Array:
        """Scaled latents of some places in a batch of this size, which the last place fills up."""
        filled = [places[min(i, len(places) - 1)] for i in range(size)]
        return self.pipe.devices.shard_batch(take(self._loop, np.array(filled, np.int32)).state.x)

    @property
    def x0(self) -> jax.Array:
        """The denoised samples of every place."""
        return self._loop.state.x0

    def _put(self, loop: Loop) -> Loop:
        """The loop where the batch belongs, so that every call finds its arguments alike."""
        return self.pipe.devices.shard_batch(loop)
