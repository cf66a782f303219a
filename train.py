"""Trains what a config describes: python train.py --config configs/NAME.py --workdir DIR [--config.section.key=value].

The same command resumes. SIGTERM writes a checkpoint and ends the run with exit code 0.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import jax

from sdjax.core.compile_cache import keep_compiled
from sdjax.core.config import Config
from sdjax.core.errors import run_or_exit
from sdjax.core.flags import load_config, parse
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import check_batch, placer, put_batch
from sdjax.tasks.base import export_folder, make_task
from sdjax.training.checkpoint import Checkpoints, check_owner, claim
from sdjax.training.metrics import Metrics
from sdjax.training.optim import make_optimizer
from sdjax.training.step import init_state, make_step

FIRST_STAGE = "first_stage"
# What may change between two runs in one workdir: how long, how often to tell, and on which devices.
FREE = ("train.steps", "train.log_every", "train.sample_every", "train.checkpoint_every", "train.keep_checkpoints")
FREE += ("mesh", "sample", "eval", f"task.{FIRST_STAGE}")


def main() -> None:
    """Reads the command line and trains."""
    config, workdir = parse(__doc__, "workdir")
    keep_compiled()
    train_and_evaluate(config, Path(workdir))


def train_and_evaluate(config: Config, workdir: Path) -> Path:
    """Trains, its first stage before it where there is one; returns the folder of what was exported.

    Raises:
        UserError: the config, the data or the workdir is not what it should be, or the loss is not finite.
    """
    # ---- the first stage, unless it is a folder already ----
    config = config.copy_and_resolve_references()
    first = config.task.get(FIRST_STAGE, "")
    if ".py" in first:
        config.task[FIRST_STAGE] = str(train_and_evaluate(load_config(first), workdir / FIRST_STAGE))

    # ---- what is trained, on which devices, in whose folder ----
    options, folder = config.train, export_folder(workdir)
    mesh = make_mesh(config.mesh)
    check_batch(options.batch_size // options.accumulate, mesh, "train.batch_size / train.accumulate")
    check_owner(workdir, config.to_dict(), FREE)
    task = make_task(config, mesh)
    optimizer = make_optimizer(config.optim, options.steps)
    step_fn = make_step(task, optimizer, options.seed, decay=config.optim.ema_decay, accumulate=options.accumulate)

    with jax.set_mesh(mesh), Checkpoints(workdir, options.keep_checkpoints) as checkpoints:
        # ---- restore, or begin ----
        start = checkpoints.latest or 0
        if start >= options.steps and folder.exists():
            return folder
        stored = task.stored(placer(mesh))
        frozen = {name: stored.pop(name) for name in task.frozen}
        state = init_state(task, optimizer, options.seed, mesh, stored)
        batches = task.batch({**frozen, **state.params})
        claim(workdir, config.to_dict())
        if start:
            state, position = checkpoints.restore(state)
            batches.set_state(position)

        # ---- train ----
        with Metrics(workdir, start, options) as log, StopSignal() as stop:
            for step in range(start + 1, options.steps + 1):
                state, metrics = step_fn(state, frozen, put_batch(next(batches), mesh))
                log.report(step, metrics)
                last = step == options.steps
                if last or stop.asked or step % options.checkpoint_every == 0:
                    log.flush()  # a loss that is not finite must stop the run before its parameters are kept
                    checkpoints.save(state, batches.get_state())
                if stop.asked:
                    raise SystemExit(0)
                if last or step % options.sample_every == 0:
                    log.picture(step, "samples", task.sample({**frozen, **state.ema}))

    # ---- what others can load ----
    task.export({**frozen, **state.ema}, folder)
    return folder


class StopSignal:
    """While it is entered, SIGTERM is a wish that the loop grants between two steps."""

    def __enter__(self) -> StopSignal:
        """Takes the signal over."""
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        """Gives it back."""
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True


if __name__ == "__main__":
    run_or_exit(main)
