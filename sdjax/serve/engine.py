"""The front of the one thread that owns the devices: any thread submits, cancels and reads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import Row
from sdjax.serve.jobs import Call, Job, QueueFullError
from sdjax.serve.lanes import Passage
from sdjax.serve.limits import Limits
from sdjax.serve.metrics import ServerMetrics
from sdjax.serve.models import Model, Models
from sdjax.serve.outputs import keep
from sdjax.serve.warm_up import warm_up
from sdjax.serve.worker import EngineOptions, Worker

KEPT = 200  # jobs that have ended

logger = logging.getLogger("sdjax")


class Engine:
    """Jobs from any thread, done in one.

    Attributes:
        models: checkpoints; its `current` is used where a request names none.
        options, limits: of the server, and of each request.
        jobs: that wait, run, or ended lately, by id.
        metrics: for `/metrics`.
        is_ready: whether everything is loaded and compiled that was to be at the start.
        is_draining: whether new requests are refused.
    """

    def __init__(self, models: Models, options: EngineOptions | None = None, limits: Limits | None = None) -> None:
        """Start nothing yet."""
        self.models, self.options, self.limits = models, options or EngineOptions(), limits or Limits()
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.metrics = ServerMetrics()
        self.is_ready = self.is_draining = False
        self._worker = Worker(models, self.options, self.metrics, self.limits.max_steps)
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._holds: dict[Job, Model] = {}
        self._sizes: Sequence[tuple[int, int]] | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self, sizes: Sequence[tuple[int, int]] | None = None) -> Future[None]:
        """Start the thread, which loads the models that fit into memory and compiles for images of some sizes.

        Args:
            sizes: heights and widths; () compiles nothing before the first request, None is each model's own size.

        Returns:
            When all is ready, None; or the UserError of what cannot be loaded.
        """

        def prepare() -> None:
            for model in self.models.that_fit():
                self._load(model)
                self.models.release(model)
            self.is_ready = True

        self._sizes = sizes
        ready: Future[None] = Future()
        self._commands.append((prepare, ready))
        self._thread.start()
        return ready

    def stop(self, seconds: float | None = None) -> None:
        """Finish what is there, for at most so many seconds, and end the thread; new requests are refused."""
        with self._changed:
            self.is_draining = self._worker.is_ending = True
            self._changed.notify()
        self._thread.join(seconds)

    async def pipeline(self, name: str | None = None) -> Pipeline:
        """The pipeline of a model, loaded if it was not.

        Raises:
            UserError: it is unknown or cannot be loaded.
        """
        model = await self._acquire(name)
        try:
            assert model.pipe is not None, "acquired"
            return model.pipe
        finally:
            self.models.release(model)

    async def submit(self, name: str | None, calls: Sequence[Call], origin: str) -> Job:
        """Check and prepare a request, and let it wait for the devices.

        Args:
            name: of a model; None for the current one.
            calls: of the pipeline.
            origin: the API that it came by.

        Raises:
            UserError: something about the request is wrong, which one line says.
            QueueFullError: no place is free.
        """
        self._check_room()
        self.limits.check_calls(calls)
        model = await self._acquire(name)
        try:
            job = await asyncio.to_thread(self._prepare, model, calls, origin)
            self._enqueue(job, model)
        except BaseException:
            self.models.release(model)
            raise
        return job

    def cancel(self, job: Job) -> None:
        """End a job between two network calls; one that has ended stays as it is."""
        job.end("cancelled")
        with self._changed:
            self._changed.notify()

    def running(self) -> Job | None:
        """The oldest job on the devices."""
        return next((job for job in list(self.jobs.values()) if job.state == "running"), None)

    def waiting(self) -> int:
        """Jobs in the queue."""
        return sum(job.state == "queued" for job in list(self.jobs.values()))

    async def call(self, function: Callable[[], Any]) -> Any:
        """The answer of a function that runs in the engine's thread."""
        future: Future[Any] = Future()
        with self._changed:
            self._commands.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def _check_room(self) -> None:
        if self.is_draining:
            raise QueueFullError("the server is about to end", 60)
        if self.waiting() >= self.options.queue_length:
            seconds = max(1, round(self._worker.left() / 2)) if self._worker.left() else 10
            raise QueueFullError(f"the queue is full: {self.options.queue_length} requests wait", seconds)

    async def _acquire(self, name: str | None) -> Model:
        model = self.models.find(name)
        if self.models.share(model):
            return model
        while not await self.call(lambda: self._load(model)):
            await asyncio.sleep(0.1)
        return model

    def _load(self, model: Model) -> bool:
        """Acquire a model, compiled where it was not there; False where others must end before."""
        was_there = model.pipe is not None
        if not self.models.acquire(model):
            return False
        try:
            if not was_there:
                warm_up(self._worker, model, self._sizes)
        except BaseException:
            self.models.release(model)
            raise
        return True

    def _prepare(self, model: Model, calls: Sequence[Call], origin: str) -> Job:
        rows: list[Row] = []
        with model.lock:
            pipe: Any = model.pipe
            for call in calls:
                rows += pipe.prepare(call.prompt, call.negative_prompt, **call.options)
        self.limits.check_rows(rows)
        about = {"model": model.name, "dtype": pipe.dtype}
        return Job(model.name, rows, origin, about)

    def _enqueue(self, job: Job, model: Model) -> None:
        with self._changed:
            self._check_room()
            self.jobs[job.id], self._holds[job] = job, model
            self._worker.add([Passage(job, number, row) for number, row in enumerate(job.rows)])
            self._changed.notify()
        self.metrics.requests.labels(job.origin).inc()

    def _work(self) -> None:
        while True:
            try:
                self._obey()
                self._worker.turn()
            except Exception as error:
                logger.exception("the engine failed")
                self._worker.fail_all(f"the server failed: {type(error).__name__}")
            self._let_go()
            with self._changed:
                if self._worker.is_idle and not self._commands:
                    if self.is_draining:
                        return
                    self._changed.wait(1.0)

    def _obey(self) -> None:
        """Run what others asked this thread to do."""
        while self._commands:
            function, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _let_go(self) -> None:
        """Forget jobs that have ended, keep their images, and let their models go."""
        for job in [job for job in list(self._holds) if job.has_ended]:
            self.models.release(self._holds.pop(job))
            self.metrics.ended.labels(job.state).inc()
            if self.options.outdir is not None:
                keep(job, self.options.outdir)
        with self._changed:
            ended = [key for key, one in self.jobs.items() if one.has_ended and one not in self._holds]
            for key in ended[: max(0, len(ended) - KEPT)]:
                del self.jobs[key]
