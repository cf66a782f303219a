"""Work on the devices, a turn at a time: what waits joins the loops, and what is done leaves them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.images import to_uint8
from sdjax.diffusion.samplers.table import padded_length
from sdjax.pipeline.cascade import next_stage
from sdjax.pipeline.execute import finish, second_pass
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import Row
from sdjax.serve import previews
from sdjax.serve.jobs import Job, Result
from sdjax.serve.lanes import Begun, Lane, Passage, Seat
from sdjax.serve.metrics import ServerMetrics
from sdjax.serve.models import Models

EVERY = 0.3  # seconds between two previews
SMOOTHING = 0.1  # of the measured rate


class EngineOptions(NamedTuple):
    """Choices of the server.

    Attributes:
        batch_sizes: of the loops, ascending.
        queue_length: jobs that may wait.
        rows_per_call: rows of the tables between two chances to join, leave or cancel.
        lanes: loops at a time, for requests that cannot share one.
        outdir: where images are kept; None for nowhere.
    """

    batch_sizes: tuple[int, ...] = (1, 4)
    queue_length: int = 64
    rows_per_call: int = 1
    lanes: int = 4
    outdir: Path | None = None


class Worker:
    """Images that wait, and the loops that run; only `add` may be called by other threads than one.

    Attributes:
        lanes: loops, each with at least one image.
        is_ending: whether what is not needed is left undone.
        colours: of previews, by model.
    """

    def __init__(self, models: Models, options: EngineOptions, metrics: ServerMetrics, max_steps: int) -> None:
        """Begin with nothing to do.

        Args:
            models, options, metrics: of the engine.
            max_steps: of a request; it decides the length of all tables.
        """
        self.models, self.options, self.metrics = models, options, metrics
        self.length = padded_length(2 * max_steps + 1)  # some samplers call the network twice a step
        self.lanes: list[Lane] = []
        self.is_ending = False
        self._seconds = 0.0  # of a network call of one image
        self.colours: WeakKeyDictionary[Pipeline, np.ndarray] = WeakKeyDictionary()
        self._queue: deque[Passage] = deque()
        self._lock = threading.Lock()
        self._shown = 0.0
        self._previews: list[tuple[Any, dict[int, tuple[Job, int]]]] = []

    def add(self, passages: Sequence[Passage]) -> None:
        """Let images wait, after those that do."""
        with self._lock:
            self._queue.extend(passages)

    @property
    def is_idle(self) -> bool:
        """True if nothing waits and nothing runs."""
        return not self._queue and not self.lanes

    def left(self) -> float:
        """Seconds until nothing waits; 0 until a call was measured."""
        return self._seconds * sum(job.total - job.done for job in {*self._waiting_jobs(), *self._running_jobs()})

    def turn(self) -> None:
        """One call of every loop, and all that is due between calls."""
        began, advanced = time.monotonic(), 0
        self._drop_ended()
        self._admit()
        for lane in self.lanes:
            rows = lane.call(self.options.rows_per_call)
            advanced += rows * len(lane.seats)
            for passage, _ in lane.seats.values():
                passage.job.done += rows
        for lane in list(self.lanes):
            lane.wait()
            self._show()
            self._pass_on(lane, lane.arrived())
        self.lanes = [lane for lane in self.lanes if lane.seats]
        if advanced:
            seconds = time.monotonic() - began
            self.metrics.stages.labels("turn").observe(seconds)
            self._seconds += (seconds / advanced - self._seconds) * (SMOOTHING if self._seconds else 1.0)
        self._tell()

    def fail_all(self, error: str) -> None:
        """End every job."""
        for job in {*self._waiting_jobs(), *self._running_jobs()}:
            job.end("failed", error)
        self.lanes, self._previews = [], []
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Take out images of jobs that were cancelled or have failed."""
        with self._lock:
            self._queue = deque(passage for passage in self._queue if not passage.job.has_ended)
        for lane in self.lanes:
            for passage in [passage for passage, _ in lane.seats.values() if passage.job.has_ended]:
                lane.leave(passage)
        self.lanes = [lane for lane in self.lanes if lane.seats]

    def _admit(self) -> None:
        """Let images that wait join loops with places, the first come first.

        An image whose loop is full waits for it, and lets others pass; one for which there is no loop lets nobody pass.
        """
        most, begun = self.options.batch_sizes[-1], 0
        joining: dict[tuple, list[Passage]] = {}
        lanes = {lane.key: lane for lane in self.lanes}
        for passage in list(self._queue):
            if begun >= 2 * most:
                break
            if not self._guard(passage.job, lambda p=passage: self._begin(p)):
                continue
            begun += 1
            assert passage.begun is not None
            key = passage.begun.key
            taken = len(joining.get(key, ())) + (len(lanes[key].seats) if key in lanes else 0)
            if taken >= most:
                continue
            if key not in lanes and key not in joining and len({*lanes, *joining}) >= self.options.lanes:
                break
            joining.setdefault(key, []).append(passage)
        for key, passages in joining.items():
            self._join(lanes.get(key), passages)
        for lane in self.lanes:
            lane.resize(self._size(len(lane.seats), lane.pipe))

    def _join(self, lane: Lane | None, passages: Sequence[Passage]) -> None:
        first = passages[0].begun
        assert first is not None, "begun before it joins"
        pipe = self._pipe(passages[0])
        if lane is None:
            lane = Lane(pipe, first, self._size(len(passages), pipe))
            self.lanes.append(lane)
        lane.resize(max(lane.size, self._size(len(lane.seats) + len(passages), pipe)))
        for passage in passages:
            lane.join(passage)
            passage.job.begin()
        with self._lock:
            self._queue = deque(passage for passage in self._queue if passage not in passages)

    def _size(self, images: int, pipe: Pipeline) -> int:
        """The least batch size for so many images."""
        sizes = [size for size in self.options.batch_sizes if size % pipe.devices.min_batch == 0]
        return next((size for size in sizes if size >= images), sizes[-1])

    def _begin(self, passage: Passage) -> None:
        if passage.begun is None:
            model = self.models.find(passage.job.model)
            with model.lock, self.metrics.stages.labels("begin").time():
                passage.begun = Begun(self._pipe(passage), passage, self.length)

    def _pipe(self, passage: Passage) -> Pipeline:
        first = self.models.find(passage.job.model).pipe
        assert first is not None, "a model with jobs stays"
        pipe = (first, *first.later)[passage.stage]
        refiner = pipe.refiner
        if passage.part == 0 or refiner is None:
            return pipe
        return refiner

    def _pass_on(self, lane: Lane, seats: Sequence[Seat]) -> None:
        """After their last row: to the next model, or together through the decoder."""
        last: dict[int, list[Seat]] = {}
        for seat in seats:
            passage = seat.passage
            if passage.part + 1 == len(passage.row.parts):
                last.setdefault(passage.row.tile, []).append(seat)
                continue
            passage.part += 1
            passage.noisy = lane.latents([seat.place], lane.pipe.devices.min_batch)
            self._again(passage)
        for group in last.values():
            self._finish(lane, group)

    def _finish(self, lane: Lane, seats: Sequence[Seat]) -> None:
        """Decode images, and let them out or to their second pass; where a batch fails, each is tried alone."""
        with self.metrics.stages.labels("finish").time():
            try:
                images = self._decoded(lane, seats)
            except UserError as error:
                for seat in seats:
                    if len(seats) > 1:
                        self._finish(lane, [seat])
                    else:
                        seat.passage.job.end("failed", str(error))
                return
        for seat, image in zip(seats, images, strict=False):
            self._guard(seat.passage.job, lambda p=seat.passage, x=image: self._let_out(p, x))

    def _decoded(self, lane: Lane, seats: Sequence[Seat]) -> list[np.ndarray]:
        pipe, size = lane.pipe, self._size(len(seats), lane.pipe)
        latents = lane.latents([seat.place for seat in seats], size)
        if not np.isfinite(np.asarray(pipe.devices.all_gather(latents))).all():
            raise UserError(f"the UNet's output is not finite: the weights of {pipe.name} hold values that overflow")
        rows = [seats[min(i, len(seats) - 1)].passage.row for i in range(size)]
        with pipe.devices.mesh_context():
            return finish(pipe, rows, latents)

    def _let_out(self, passage: Passage, image: np.ndarray) -> None:
        second = second_pass(passage.row, image)
        if second is not None:
            return self._begin_anew(passage, second)
        stage = next_stage(self._pipe(passage), passage.row, image)
        if stage is not None:
            passage.stage += 1
            return self._begin_anew(passage, stage[1])
        job = passage.job
        job.results[passage.number] = Result(to_uint8(image), dict(job.records[passage.number]))
        self.metrics.images.inc()
        if all(job.results):
            job.end("done")
        return None

    def _begin_anew(self, passage: Passage, row: Row) -> None:
        """Let an image wait for another pass or stage."""
        passage.row, passage.part, passage.noisy = row, 0, None
        self._again(passage)

    def _again(self, passage: Passage) -> None:
        """Let an image wait before all others, for its next model or pass."""
        with self._lock:
            self._queue.appendleft(passage)

    def _guard(self, job: Job, step: Callable[[], object]) -> bool:
        """Do a step of a job's; False where it failed, and with it the job."""
        try:
            step()
        except UserError as error:
            job.end("failed", str(error))
            return False
        return True

    def _waiting_jobs(self) -> Iterator[Job]:
        with self._lock:
            queue = list(self._queue)
        yield from dict.fromkeys(passage.job for passage in queue)

    def _running_jobs(self) -> Iterator[Job]:
        seats = [seat for lane in list(self.lanes) for seat in list(lane.seats.values())]  # of another thread, perhaps
        yield from dict.fromkeys(passage.job for passage, _ in seats)

    def _tell(self) -> None:
        """Progress, time left, previews and places of all jobs."""
        now = time.monotonic()
        shows = now - self._shown >= EVERY
        if shows:
            self._shown = now
            for lane in self.lanes:
                self._preview(lane)
        for job in self._running_jobs():
            began = job.started or time.time()
            job.eta = (time.time() - began) * (job.total - job.done) / job.done if job.done else None
            job.notify()
        before = sum(job.total - job.done for job in self._running_jobs())
        queued = [job for job in self._waiting_jobs() if job.state == "queued"]
        for place, job in enumerate(queued, 1):
            before += job.total
            moved = job.place != place
            job.place, job.eta = place, before * self._seconds or None
            if moved or shows:
                job.notify()
        self.metrics.waiting.set(len(queued))
        self.metrics.batch_fill.set(_fill(self.lanes))

    def _preview(self, lane: Lane) -> None:
        """Start previews of a loop, for `_show` to fetch after the next call, so that no call waits for them."""
        colours = self.colours.get(lane.pipe)
        if colours is not None:
            jobs = {place: (passage.job, last) for place, (passage, last) in lane.seats.items()}
            self._previews.append((lane.pipe.devices.all_gather(previews.preview(lane.x0, colours)), jobs))

    def _show(self) -> None:
        """Give every job the preview of its image that is furthest."""
        for made, jobs in self._previews:
            images = np.asarray(made)
            furthest: dict[Job, tuple[int, int]] = {}
            for place, (job, last) in jobs.items():
                furthest[job] = min(furthest.get(job, (last, place)), (last, place))
            for job, (_, place) in furthest.items():
                job.show(images[place])
        self._previews.clear()


def _fill(lanes: Sequence[Lane]) -> float:
    """Share of the loops' places that images have."""
    size = sum(lane.size for lane in lanes)
    return sum(len(lane.seats) for lane in lanes) / size if size else 0.0
