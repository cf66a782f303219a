"""Trains what a config describes: python train.py --config configs/NAME.py --workdir DIR [--config.section.key=value].

The same command resumes. SIGTERM and SIGUSR1 write a checkpoint and end the run with exit code 0.

Several processes: SLURM, Open MPI and TPU pods are recognised; elsewhere start each with --coordinator HOST:PORT
--processes N --process_id I. DIR is one folder for all of them, gs://BUCKET/FOLDER too. --coordinator_timeout SECONDS:
how long to wait for the others at the start (300); --heartbeat_timeout: how long for one that is silent (100).

--check_data reads the data instead, prints every bad row, and ends with exit code 2 if there is one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import jax
from absl import flags
from etils import epath

from sdjax.core.compilation import keep_compiled
from sdjax.core.config import EXPORT, Config
from sdjax.core.flags import define_processes, processes
from sdjax.core.scripts import command_line, load_config, require
from sdjax.core.tree import merge
from sdjax.data.sources import validate
from sdjax.parallel.batches import put_batch
from sdjax.parallel.distributed import initialise, run_together
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import check_batch, sharded_put
from sdjax.tasks.make import make_task
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.export import exported, local_folder, write_export
from sdjax.training.limits import check_limits, is_due
from sdjax.training.lock import Lock
from sdjax.training.metrics import Metrics
from sdjax.training.optim import learning_rates, make_optimizer, warn_of_changed_rates
from sdjax.training.preemption import Preemption, end_well_before
from sdjax.training.profile import Profile
from sdjax.training.step import init_state, make_step
from sdjax.training.task import split_frozen
from sdjax.training.workdir import check_owner, claim, open_workdir

FIRST_STAGE = "first_stage"
# What may change between two runs in one workdir: how long, how often to tell, what to keep, and on which devices.
FREE = ("train.steps", "train.log_every", "train.sample_every", "train.checkpoint_every", "train.keep_checkpoints")
FREE += ("train.keep_best", "train.restore", "train.profile", "data.threads", "data.workers", "mesh", "sample", "eval")
FREE += (f"task.{FIRST_STAGE}",)


def main() -> None:
    """Reads the command line, joins the other processes where there are some, and trains."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("sdjax").setLevel(logging.INFO)
    values = command_line(__doc__, define_flags, define_processes)
    config = require(values, "config")
    if values["check_data"].value:
        raise SystemExit(2 if validate.report(config.data.source) else 0)
    workdir = require(values, "workdir")
    keep_compiled()
    initialise(**processes(values))
    train_and_evaluate(config, workdir)


def define_flags(values: flags.FlagValues) -> None:
    """Flags beside the config and the processes."""
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_bool("check_data", False, "report every bad row of the data and end", flag_values=values)


def first_stage(name: str, config: Config) -> Config:
    """The first stage's config; where it names no data, it sees those of the second.

    Raises:
        UserError: it cannot be read.
    """
    found = load_config(name)
    found.data.source = found.data.source or config.data.source
    return found


def train_and_evaluate(config: Config, workdir: str | os.PathLike) -> Path | epath.Path:
    """Trains, its first stage before it where there is one; returns the folder of what was exported.

    Raises:
        UserError: the config, the data or the workdir is not what it should be, or the loss is not finite.
    """
    # ---- the first stage, unless it is a folder already ----
    check_limits(config)
    root = open_workdir(workdir)
    config = config.copy_and_resolve_references()
    if first := config.task.get(FIRST_STAGE, ""):
        folder = train_and_evaluate(first_stage(first, config), root / FIRST_STAGE) if ".py" in first else first
        config.task[FIRST_STAGE] = local_folder(str(folder))

    # ---- what is trained, on which devices, in whose folder ----
    options = config.train
    mesh = make_mesh(config.mesh)
    check_batch(options.batch_size // options.accumulate, mesh, "train.batch_size / train.accumulate")
    check_owner(root, config.to_dict(), FREE)
    task = make_task(config, mesh)
    optimizer, rates = make_optimizer(config.optim, options.steps), learning_rates(config.optim, options.steps)
    step_fn = make_step(task, optimizer, options.seed, decay=config.optim.ema_decay, accumulate=options.accumulate)
    profile = Profile(root, options.profile, options.steps)

    with jax.set_mesh(mesh), Preemption() as preemption, Lock(root) as lock, Checkpoints(root, config) as checkpoints:
        # ---- restore, or begin ----
        start = checkpoints.latest or 0
        if start >= options.steps and exported(root, start):
            return root / EXPORT
        frozen, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
        state = init_state(task, optimizer, options.seed, mesh, initial)
        batches = task.batch(merge(frozen, state.params))
        claim(root, config.to_dict())
        if start:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
            start = int(state.step)
            warn_of_changed_rates(config.optim, checkpoints.config["train"]["steps"], options.steps, start)

        # ---- train ----
        with Metrics(root, start, options, rates) as log, profile:
            for step in range(start + 1, options.steps + 1):
                with profile.step(step):
                    batch = log.next_batch(batches)
                    state, metrics = step_fn(state, frozen, put_batch(batch, mesh))
                profile.stepped(step, metrics)
                log.report(step, metrics)
                lock.check()
                checkpoints.check()
                stop, last = preemption.reached(), step == options.steps
                if stop or last or is_due(step, options.checkpoint_every):
                    means = log.means()  # a loss that is not finite must stop the run before its parameters are kept
                    checkpoints.save(state, batches.get_state(), means)
                if stop:
                    raise SystemExit(0)
                if (last and options.sample_every) or is_due(step, options.sample_every):
                    log.image(step, "samples", task.preview(merge(frozen, state.ema)))

        # ---- what others can load ----
        write_export(task.export, merge(frozen, state.ema), root, int(state.step), mesh)
    return root / EXPORT


if __name__ == "__main__":
    end_well_before("the first step")
    run_together(main)
