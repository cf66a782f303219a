"""Trains what a config describes: python train.py --config configs/NAME.py --workdir DIR [--config.section.key=value].

The same command resumes. SIGTERM writes a checkpoint and ends the run with exit code 0.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import jax
from ml_collections import ConfigDict

from sdjax.core.errors import run_or_exit
from sdjax.core.flags import load_config, parse
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import check_batch, put_batch, tree_shardings
from sdjax.tasks.base import export_folder, make_task
from sdjax.training.checkpoint import Checkpoints, claim_workdir
from sdjax.training.metrics import Metrics
from sdjax.training.optim import make_optimizer
from sdjax.training.step import init_state, make_step

FIRST_STAGE = "first_stage"
# What may change between two runs in one workdir: how long, how often to tell, and on which devices.
FREE = ("train.steps", "train.log_every", "train.sample_every", "train.checkpoint_every", "train.keep_checkpoints")
FREE += ("mesh", "sample", "eval", f"task.{FIRST_STAGE}", "optim.schedule", "optim.learning_rate")


def main() -> None:
    """Reads the command line and trains."""
    config, workdir = parse(__doc__, "workdir")
    train_and_evaluate(config, Path(workdir))


def train_and_evaluate(config: ConfigDict, workdir: Path) -> Path:
    """Trains, its first stage before it where there is one; returns the folder of what was exported.

    Raises:
        UserError: the config, the data or the workdir is not what it should be, or the loss is not finite.
    """
    # ---- the first stage, unless it is a folder already ----
    config = config.copy_and_resolve_references()
    first = config.task.get(FIRST_STAGE, "")
    if ".py" in first:
        config.task[FIRST_STAGE] = str(train_and_evaluate(load_config(first), workdir / FIRST_STAGE))

    # ---- what is trained, and where ----
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size // config.train.accumulate, mesh, "train.batch_size / train.accumulate")
    claim_workdir(workdir, config.to_dict(), FREE)
    steps, seed = config.train.steps, config.train.seed
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    folder = export_folder(workdir)
    if checkpoints.latest is not None and checkpoints.latest >= steps and folder.exists():
        checkpoints.close()
        return folder
    task = make_task(config, mesh)
    optimizer = make_optimizer(config.optim, steps)
    frozen = jax.device_put(task.frozen, tree_shardings(task.frozen, mesh))

    # ---- restore or begin ----
    state = init_state(task, optimizer, seed, mesh)
    batches = task.batch({**frozen, **state.params})
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state)
        batches.set_state(position)
    start = int(state.step)

    # ---- the loop ----
    step_fn = make_step(task, optimizer, seed, decay=config.optim.ema_decay, accumulate=config.train.accumulate)
    log = Metrics(workdir, start=start, steps=steps, batch_size=config.train.batch_size, every=config.train.log_every)
    stop = StopSignal()
    try:
        for step in range(start + 1, steps + 1):
            state, metrics = step_fn(state, frozen, put_batch(next(batches), mesh))
            log.report(step, metrics)
            if step % config.train.sample_every == 0 or step == steps:
                log.picture(step, "samples", task.sample({**frozen, **state.ema}))
            if step % config.train.checkpoint_every == 0 or step == steps or stop.asked:
                log.flush()  # a loss that is not finite must stop the run before its parameters are kept
                checkpoints.save(state, batches.get_state())
            if stop.asked:
                raise SystemExit(0)
        log.flush()
    finally:
        log.close()
        checkpoints.close()

    # ---- what others can load ----
    task.export({**frozen, **state.ema}, folder)
    return folder


class StopSignal:
    """Turns SIGTERM into a wish that the loop grants between two steps."""

    def __init__(self) -> None:
        """Takes over the signal."""
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True


if __name__ == "__main__":
    run_or_exit(main)
