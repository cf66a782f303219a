"""Checkpoints: one Orbax composite of state, data position and metadata. Restore or fail; never start afresh."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.files import cannot_write
from sdjax.parallel.distributed import is_first, sync
from sdjax.training.checkpoint_folder import (
    CORRUPT,
    SEAL,
    SUSPECT,
    put_aside,
    read_notes,
    remove,
    seal,
    tidy,
    whole_steps,
)
from sdjax.training.fingerprint import fingerprint
from sdjax.training.metrics import NotFinite
from sdjax.training.step import TrainState
from sdjax.training.workdir import CHECKPOINTS, Unwritable, unwritable

LATEST, PREVIOUS = "latest", "previous"

logger = logging.getLogger("sdjax")


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback of what it raises, and asyncio those of its tasks; here such an error is one line."""
    return "orbax" not in f"{record.pathname} {record.getMessage()}"


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_of_orbax)


def _hush_closed_loops() -> None:
    """After a failure the rest of Orbax' writing ends in event loops that it has closed: a traceback each."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = hook


_hush_closed_loops()  # before there is a failure: the tracebacks may come sooner than its own error


class Checkpoints:
    """The checkpoints of a workdir, written in the background.

    Of those there are, the newest `train.keep_checkpoints` are retained; where `train.keep_best` names a metric, as
    many with its lowest means beside them. One more is there while a run goes on: the newest is only known to be good
    when the loss of its parameters is.
    """

    def __init__(self, workdir: epath.Path, config: Config):
        """Opens workdir/checkpoints, making it if need be; what a killed run left there is removed or put aside.

        Raises:
            UserError: `config.train.restore` is unknown, or nothing can be written there.
        """
        options = config.train
        if options.restore not in (LATEST, PREVIOUS):
            raise unknown("choice", options.restore, (LATEST, PREVIOUS), "config.train.restore")
        self._folder, self._restore = (workdir / CHECKPOINTS).absolute(), options.restore
        self._count, self._best = options.keep_checkpoints, options.keep_best
        self._metadata = {"config": config.to_dict(), "jax": jax.__version__, "orbax": ocp.__version__}
        if is_first():
            with unwritable(workdir):
                self._folder.mkdir(parents=True, exist_ok=True)
                tidy(self._folder)
        sync("checkpoints")
        self._means = {step: self._means_of(step) for step in whole_steps(self._folder)}
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._deleting = ThreadPoolExecutor(1, "delete checkpoints")
        self._deletions: list[Future[None]] = []
        self.config: dict[str, Any] = self._metadata["config"]
        """Of the run that wrote the checkpoint that was restored."""

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return max(self._means, default=None)

    def save(self, state: TrainState, position: bytes, metrics: dict[str, float]) -> None:
        """Begins to write; returns before the disk is done.

        Args:
            state: of all processes.
            position: of the data iterator.
            metrics: their means since the checkpoint before; not finite ones are left out.

        Raises:
            UserError: the state holds a NaN or an infinity, or the checkpoint before could not be written.
        """
        step = int(state.step)
        if step == self.latest:
            return
        self._wait()
        self._prune()
        sums, ruined = fingerprint(state)
        if ruined:
            raise UserError(f"{ruined[0]} is not finite after step {step}, so it is not kept; {self._intact()}")
        means = {name: value for name, value in metrics.items() if math.isfinite(value)}
        notes, metadata = json.loads(position), {**self._metadata, "sums": sums, "metrics": means}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            data=ocp.args.JsonSave(notes),
            metadata=ocp.args.JsonSave({**metadata, SEAL: seal(notes, metadata)}),
        )
        self._means[step] = means
        with self._writing():
            self._checkpointer.save(self._folder / str(step), args=args)

    def check(self) -> None:
        """Raises a UserError if a checkpoint could not be written in the background; waits for nothing."""
        with self._writing():
            self._checkpointer.check_for_errors()

    def restore(self, like: TrainState) -> tuple[TrainState, bytes]:
        """The newest checkpoint, in the shapes and shardings of `like`, which is donated.

        With `config.train.restore=previous` a newest one that cannot be read is renamed, and the one before it read.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        steps = sorted(self._means, reverse=True)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        jax.tree.map(lambda array: array.delete(), like)
        try:
            return self._read(steps[0], shapes)
        except UserError as error:
            if len(steps) < 2:
                raise UserError(f"{error}; there is none before it") from error
            if self._restore == LATEST:
                hint = f"--config.train.restore={PREVIOUS} goes back to step {steps[1]}"
                raise UserError(f"{error}; {hint}") from error
            logger.warning("%s; going on from step %d", error, steps[1])
        self._put_newest_aside(CORRUPT)
        return self._read(steps[1], shapes)

    def _read(self, step: int, shapes: Any) -> tuple[TrainState, bytes]:
        """One checkpoint; where one process cannot read it, all say so."""
        path = self._folder / str(step)
        restored, notes, reason, cause = None, None, "", None
        try:
            notes = read_notes(path)
            restored = self._checkpointer.restore(path, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
        except Exception as error:  # whatever the reader stumbled on, the run must not go on
            reason, cause = _line(error), error
        if _any_process(restored is None):
            raise UserError(f"cannot restore {path}: {reason or 'another process'}") from cause
        assert restored is not None
        assert notes is not None
        state, sums = TrainState(**restored["state"]), notes.metadata["sums"]
        wrong = [name for name, value in fingerprint(state).sums.items() if sums.get(name) != value]
        wrong += ["step"] if int(state.step) != step else []
        if wrong:
            raise UserError(f"cannot restore {path}: {wrong[0]} is not what was saved")
        self.config = notes.metadata["config"]
        return state, json.dumps(notes.position).encode()

    def _wait(self) -> None:
        """Waits until everything is written, and everything deleted."""
        with self._writing():
            self._checkpointer.wait_until_finished()
        with unwritable(self._folder):
            for deletion in self._deletions:
                deletion.result()

    def _prune(self) -> None:
        """Begins to delete what need not be retained."""
        retained = _retained(self._means, self._count, self._best)
        outdated = [self._folder / str(step) for step in self._means if step not in retained]
        self._means = {step: means for step, means in self._means.items() if step in retained}
        self._deletions = [self._deleting.submit(remove, path) for path in outdated] if is_first() else []

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Names the checkpoint that could not be written, and the one that is intact; Orbax's errors have no type."""
        try:
            yield
        except Exception as error:
            step = max(self._means)  # the one that was begun last
            del self._means[step]
            problem = cannot_write(self._folder / str(step), _os_error(error))
            raise UserError(f"{problem}; {self._intact()}") from error

    def _intact(self) -> str:
        step = self.latest
        return "there is no checkpoint before it" if step is None else f"the checkpoint of step {step} is intact"

    def _put_newest_aside(self, why: str) -> None:
        step = max(self._means)
        if is_first():
            put_aside(self._folder / str(step), why)
        del self._means[step]
        sync("put aside")

    def _means_of(self, step: int) -> dict[str, float]:
        """Metrics beside a checkpoint; of the newest it is only known when it is restored whether they can be read."""
        try:
            return read_notes(self._folder / str(step)).metrics
        except UserError:
            return {}

    def __enter__(self) -> Checkpoints:
        """For `with`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Waits until everything is on disk. Of what ruins a run or fills the disk it says which checkpoint is intact.

        Raises:
            UserError: the last checkpoint could not be written, or `error` was a NotFinite or an Unwritable.
        """
        try:
            self._wait()
            intact = self._distrust(error) if isinstance(error, NotFinite) else ""
            intact = self._intact() if isinstance(error, Unwritable) else intact
            self._prune()
            self._wait()
            if intact:
                raise UserError(f"{error}; {intact}") from error
        finally:
            self._deleting.shutdown()
            self._checkpointer.close()

    def _distrust(self, error: NotFinite) -> str:
        """The checkpoint whose parameters gave a loss that is not finite is put aside; which one remains."""
        step, is_data = self.latest, _any_process(error.is_data)
        if step is None or error.step != step + 1 or is_data:
            return self._intact()
        self._put_newest_aside(SUSPECT)
        return f"its parameters are those of checkpoint {step}, which is now {step}{SUSPECT}; {self._intact()}"


def _retained(means: dict[int, dict[str, float]], count: int, best: str) -> set[int]:
    """Steps of the newest, and of those with the lowest mean of the metric `best`."""
    with_mean = [step for step in means if best in means[step]]
    lowest = sorted(with_mean, key=lambda step: (means[step][best], -step))
    return {*sorted(means)[-count:], *lowest[:count]}


def _any_process(flag: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(flag)).any()) if jax.process_count() > 1 else flag


def _os_error(error: Exception) -> OSError:
    """The error of the file system, which tensorstore has as a number within its message."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(_line(error))


def _line(error: Exception) -> str:
    """The first line of an error, without the paths of a library's source."""
    return str(error).strip().split("\n")[0].partition(" [source")[0] or type(error).__name__
