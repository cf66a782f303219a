"""Metrics of a run: its progress, TensorBoard files, and previews in the workdir; by the first process alone."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params
from sdjax.parallel.distributed import is_first
from sdjax.training.limits import is_due
from sdjax.training.progress import Pace, Progress, announced, line, new_shapes
from sdjax.training.step import StepFn, TrainState
from sdjax.training.tensorboard import TensorBoard, check_tensorboard
from sdjax.training.workdir import SAMPLES, unwritable, write_whole

logger = logging.getLogger("sdjax")


class NotFinite(UserError):
    """A loss that is not finite, at `step`; `is_data` if a batch of the run itself is not."""

    def __init__(self, message: str, step: int, is_data: bool):
        super().__init__(message)
        self.step, self.is_data = step, is_data


class Metrics:
    """Reports one step behind the device, so that it never waits for the host."""

    def __init__(self, workdir: epath.Path, start: int, options: Config, rates: Mapping[str, optax.Schedule]):
        """Opens workdir/tensorboard and the bar.

        Args:
            workdir: of the run.
            start: steps taken before.
            options: the `train` section of a config.
            rates: learning rates as functions of the steps taken, by the names that they have among the metrics.

        Raises:
            UserError: TensorBoard files cannot be written there.
        """
        check_tensorboard(workdir)
        self._workdir, self._every, self._best = workdir, options.log_every, options.keep_best
        with unwritable(workdir, start):
            self._writer = TensorBoard(workdir / "tensorboard", start) if is_first() else None
        self._progress = Progress(workdir.name or "train", start, options.steps)
        self._pace, self._is_new = Pace(options.steps - start, options.batch_size), new_shapes()
        self._rates = rates
        self._batch: Any = None
        self._pending: tuple[int, dict[str, Any], Any] | None = None
        self._began, self._timed, self._waited = 0.0, False, 0.0
        self._sums: dict[str, float] = {}
        self._summed = 0

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time that it takes is counted as waiting for data."""
        self._began = time.monotonic()
        # From step to step the pace is the device's; with nothing pending a step only hands its work over, in no time.
        self._timed = self._pending is not None
        self._batch = next(batches)
        self._waited += time.monotonic() - self._began
        return self._batch

    def take(self, step_fn: StepFn, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """A step. For a batch of new shapes it is compiled first, which is announced and of which no speed speaks."""
        if not self._is_new(batch):
            return step_fn(state, frozen, batch)
        self.flush()
        with announced("compiling the training step"):
            result = jax.block_until_ready(step_fn(state, frozen, batch))
        self._timed, self._waited = False, 0.0
        return result

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of `step`, still being computed, and shows those of the step before.

        Raises:
            UserError: a loss is not finite, a NotFinite that names its step. Or `train.keep_best` is no metric, or the
                metrics cannot be written.
        """
        self.flush()
        if self._best and self._best not in metrics:
            raise unknown("metric", self._best, metrics, "config.train.keep_best")
        self._pending = (step, metrics, self._batch)
        if self._timed:
            self._pace.timed(time.monotonic() - self._began)

    def flush(self) -> None:
        """Shows what is pending."""
        if self._pending is None:
            return
        step, metrics, batch = self._pending
        self._pending = None
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            wrong = _not_finite(batch)
            data = f", whose batch is not finite in {', '.join(wrong)}" if wrong else ""
            raise NotFinite(f"the loss is {loss} at step {step}{data}", step, bool(wrong))
        self._add({"loss": loss} | ({self._best: float(metrics[self._best])} if self._best else {}))
        self._pace.step()
        self._show(step, metrics, loss)

    def _show(self, step: int, metrics: dict[str, Any], loss: float) -> None:
        due, pace = is_due(step, self._every), self._pace
        if not due and not self._progress.is_bar:
            return
        rates = {name: float(np.asarray(rate(step - 1))) for name, rate in self._rates.items()}
        self._progress.show(step, line(loss, rates["learning_rate"], pace), due)
        if not due:
            return
        shown = {name: float(value) for name, value in metrics.items()} | rates
        if pace.images_per_second is not None:
            shown["images_per_second"] = pace.images_per_second
            shown["data_wait_share"] = min(self._waited / pace.seconds, 1.0)
        if self._writer:
            with unwritable(self._workdir, step):
                self._writer.scalars({f"train/{name}": value for name, value in shown.items()}, step)
        pace.restart()
        self._waited = 0.0

    def means(self) -> dict[str, float]:
        """The means of the loss and of `train.keep_best` since this was asked last; shows what is pending.

        Raises:
            UserError: the pending loss is not finite: its parameters must not be kept.
        """
        self.flush()
        means = {name: value / self._summed for name, value in self._sums.items()}
        self._sums, self._summed = {}, 0
        return means

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes an image to TensorBoard and to workdir/samples."""
        if not self._writer:
            return
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        with unwritable(self._workdir, step):
            write_whole(self._workdir / SAMPLES / f"{name}_{step:07d}.png", png.getvalue())
            self._writer.image(name, image, step)

    def _add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._summed += 1

    def __enter__(self) -> Metrics:
        """For `with`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Shows what is pending, ends the bar and writes what is buffered."""
        try:
            if kind is None:
                self.flush()
        finally:
            self._progress.close()
            self._close_writer(is_failing=isinstance(error, Exception))

    def _close_writer(self, is_failing: bool) -> None:
        try:
            with unwritable(self._workdir):
                if self._writer:
                    self._writer.close()
        except UserError as error:
            if not is_failing:
                raise
            logger.warning("%s", error)  # what ends the run is another error, perhaps of the same disk


def _not_finite(batch: Mapping[str, np.ndarray]) -> list[str]:
    """Names of this process's columns that hold a NaN or an infinity."""
    floats = {name: rows for name, rows in batch.items() if jnp.issubdtype(np.asarray(rows).dtype, jnp.floating)}
    return [name for name, rows in floats.items() if not np.isfinite(np.asarray(rows, np.float32)).all()]
