"""Trains what a config describes: python train.py --config configs/NAME.py --workdir DIR [--config.section.key=value].

It says what it does on standard error: the data, what is compiled, the steps with loss, learning rate, images/s and the
time left, then the results and the command that uses them. Without a terminal that is one line every train.log_every
steps. The same command resumes. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint and end the run, with exit code 130
after Ctrl-C, else 0; a second Ctrl-C ends it at once.

Small enough for two CPU cores: configs/finetune.py, which fine-tunes checkpoints/openmoji on a folder of images, in
minutes; configs/openmoji_ldm.py, configs/pixels.py:openmoji, configs/classifiers.py:openmoji, configs/clip.py and
configs/autoencoders.py:openmoji_kl, 10 to 40 minutes each; configs/openmoji.py, 4 hours.

A value that is given for two stages (configs that name a first one in task.first_stage) is both stages': of the
sections data, mesh and train; others of which both have the key are refused until the first stage is finished.

Several processes: SLURM, Open MPI and TPU pods are recognised; elsewhere start each with --coordinator HOST:PORT
--processes N --process_id I. DIR is one folder for all of them, gs://BUCKET/FOLDER too. --coordinator_timeout SECONDS:
how long to wait for the others at the start (300); --heartbeat_timeout: how long for one that is silent (100).

--check_data reads the data instead, prints every bad row, and ends with exit code 2 if there is one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from sdjax.core.signals import end_well_before

    end_well_before("the first step")

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath

from sdjax.core.compilation import keep_compiled
from sdjax.core.config import EXPORT, Config
from sdjax.core.errors import UserError
from sdjax.core.flags import define_processes, processes
from sdjax.core.scripts import command_line, load_config, require
from sdjax.core.tree import flatten, merge
from sdjax.data.loader import Loader
from sdjax.parallel.batches import put_batch
from sdjax.parallel.distributed import check_agreed, initialise, run_together
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import check_batch, sharded_put
from sdjax.tasks.checking import check_data
from sdjax.tasks.make import make_task
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.export import exported, exported_step, local_folder, write_export
from sdjax.training.limits import check_limits, is_due
from sdjax.training.lock import Lock
from sdjax.training.metrics import Metrics
from sdjax.training.optim import learning_rates, make_optimizer, warn_of_changed_rates
from sdjax.training.preemption import Preemption
from sdjax.training.profile import Profile
from sdjax.training.progress import announce, announced
from sdjax.training.step import init_state, make_step
from sdjax.training.task import Task, split_frozen
from sdjax.training.workdir import CHECKPOINTS, check_moved, check_owner, claim, open_workdir

FIRST_STAGE = "first_stage"
# What may change between two runs in one workdir: how long, how often to tell, what to keep, and on which devices.
FREE = ("train.steps", "train.log_every", "train.sample_every", "train.checkpoint_every", "train.keep_checkpoints")
FREE += ("train.keep_best", "train.restore", "train.profile", "data.threads", "data.workers", "mesh", "sample", "eval")
FREE += (f"task.{FIRST_STAGE}", "data.on_bad")
# Sections of which a value given on the command line is the first stage's, too.
SHARED = ("data", "mesh", "train")
VIEWER = "pip install tensorboard; tensorboard --logdir {}"
AGAIN = "the same command goes on from there"


def main() -> None:
    """Reads the command line, joins the other processes where there are some, and trains."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("sdjax").setLevel(logging.INFO)
    values = command_line(__doc__, define_flags, define_processes)
    config = require(values, "config")
    if values["check_data"].value:
        raise SystemExit(2 if check_data(config) else 0)
    workdir = require(values, "workdir")
    keep_compiled()
    initialise(**processes(values))
    flag: Any = values["config"]
    train_and_evaluate(config, workdir, CommandLine(flag.config_filename, flag.override_values))


def define_flags(values: flags.FlagValues) -> None:
    """Flags beside the config and the processes."""
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_bool("check_data", False, "report every bad row of the data and end", flag_values=values)


class CommandLine(NamedTuple):
    """A command line's share in a config: the file, and the values that it changes, by dotted key."""

    config: str = ""
    changes: Mapping[str, Any] = {}


def first_stage(name: str, config: Config, workdir: epath.Path, changes: Mapping[str, Any]) -> Config:
    """The first stage's config, with the changes of a command line whose keys both stages have.

    Where it names no data, it sees those of the second. One that is finished already stays as it is, but for a change
    of the data, which its workdir refuses.

    Raises:
        UserError: it cannot be read, or a change cannot be meant for both stages.
    """
    found, finished = load_config(name), exported_step(workdir)
    both = {key: value for key, value in changes.items() if key.replace(".", "/") in flatten(found.to_dict())}
    shared = {key: value for key, value in both.items() if key.split(".")[0] in (("data",) if finished else SHARED)}
    if not finished and (own := sorted(both.keys() - shared.keys())):
        raise UserError(
            f"--config.{own[0]}: the first stage has this key, too, and needs a value of its own; train it alone first "
            f"(python train.py --config {name} --workdir {workdir}), then give this command again"
        )
    if shared:
        announce("the first stage, %s, takes %s from the command line, too", name, ", ".join(sorted(shared)))
    found.update_from_flattened_dict(shared)
    found.data.source = found.data.source or config.data.source
    found.train.steps = finished or found.train.steps
    return found


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike,
    given: CommandLine = CommandLine(),  # noqa: B008  (an immutable tuple)
) -> Path | epath.Path:
    """Trains, its first stage before it where there is one; returns the folder of what was exported.

    Raises:
        UserError: the config, the data or the workdir is not what it should be, or the loss is not finite.
    """
    # ---- the first stage, unless it is a folder already ----
    check_limits(config)
    root = open_workdir(workdir)
    config = config.copy_and_resolve_references()
    if first := config.task.get(FIRST_STAGE, ""):
        if ".py" in first:
            before = root / FIRST_STAGE
            first = train_and_evaluate(first_stage(first, config, before, given.changes), before)
        config.task[FIRST_STAGE] = local_folder(str(first))

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
            announce("%s is finished: %s", root, root / EXPORT)
            return root / EXPORT
        with announced(f"data {config.data.get('prepared') or config.data.source}"):
            data = task.identity()
        check_agreed("the data", json.dumps(data))
        check_moved(root, config.to_dict(), data)
        with announced(f"{root}: networks and their first weights"):
            frozen, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
            state = init_state(task, optimizer, options.seed, mesh, initial)
        with announced(f"data {config.data.get('prepared') or config.data.source}"):
            batches = task.batch(merge(frozen, state.params))
        claim(root, config.to_dict(), data)
        if start:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
            start = int(state.step)
            warn_of_changed_rates(config.optim, checkpoints.config["train"]["steps"], options.steps, start)
        announce_start(root, config, start, batches)

        # ---- train ----
        with Metrics(root, start, options, rates) as log, profile:
            for step in range(start + 1, options.steps + 1):
                with profile.step(step):
                    batch = log.next_batch(batches)
                    state, metrics = log.take(step_fn, state, frozen, put_batch(batch, mesh))
                profile.stepped(step, metrics)
                log.report(step, metrics)
                lock.check()
                checkpoints.check()
                stop, last = preemption.reached(), step == options.steps
                if stop or last or is_due(step, options.checkpoint_every):
                    means = log.means()  # a loss that is not finite must stop the run before its parameters are kept
                    checkpoints.save(state, batches.get_state(), means)
                if stop:
                    kept = root / CHECKPOINTS / str(step)
                    preemption.stop(f"stopped after step {step:,} of {options.steps:,}; kept {kept}; {AGAIN}")
                if (last and options.sample_every) or is_due(step, options.sample_every):
                    with announced(f"samples of step {step:,}"):
                        log.image(step, "samples", task.preview(merge(frozen, state.ema)))

        # ---- what others can load ----
        with announced(f"writing {root / EXPORT}"):
            write_export(task.export, merge(frozen, state.ema), root, int(state.step), mesh)
    announce_end(root, task, given.config)
    return root / EXPORT


def announce_start(root: epath.Path, config: Config, start: int, batches: Loader) -> None:
    """The lines of the log before training: the data, the steps, and the places of what becomes of them."""
    options, examples = config.train, json.loads(batches.get_state())["examples"]
    announce("data: %s images, %s steps an epoch", f"{examples:,}", f"{max(examples // options.batch_size, 1):,}")
    announce("steps %s to %s of %s images on %s", f"{start + 1:,}", f"{options.steps:,}", options.batch_size, devices())
    announce("%s: checkpoints/, samples/ (images while training), tensorboard/ (%s)", root, VIEWER.format(root))


def announce_end(root: epath.Path, task: Task, config: str) -> None:
    """The lines of the log after training: the results, and the command that uses them."""
    samples = root / "samples"
    images = f", {samples} has its images while training" if samples.exists() else ""
    announce("finished: %s is the model%s", root / EXPORT, images)
    if config and task.use:
        announce("to use it: %s", task.use.format(config=config, workdir=root))


def devices() -> str:
    """Number and kind of all devices, e.g. "8 x NVIDIA H200"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


if __name__ == "__main__":
    run_together(main)
