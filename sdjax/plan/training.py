"""The training step of a config as a program to compile."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.parallel.batches import batch_sharding
from sdjax.parallel.sharding import check_batch
from sdjax.parallel.trees import shapes_on, tree_shardings
from sdjax.plan.programs import Program
from sdjax.tasks.make import make_task
from sdjax.training.optim import make_optimizer
from sdjax.training.step import make_step, state_shapes


def training_programs(config: Config, mesh: Mesh, batch_size: int) -> list[Program]:
    """The step that `train.py` would run on the mesh, with its state donated.

    Raises:
        UserError: the config has no training part, or the mesh does not divide the batch.
    """
    check_config(config)
    options = config.train
    check_batch(batch_size // options.accumulate, mesh, "batch_size / train.accumulate")
    task, optimizer = make_task(config, mesh), make_optimizer(config.optim, options.steps)
    state = state_shapes(task, optimizer, mesh)
    frozen = shapes_on(task.frozen, tree_shardings(task.frozen, mesh))
    batch = shapes_on(task.batch_spec(batch_size), batch_sharding(mesh))
    plain = _step(_without_remat(config), mesh) if options.remat != "none" else None
    return [Program("training step", _step(config, mesh), (state, frozen, batch), donated=(0,), plain=plain)]


def check_config(config: Config) -> None:
    """Refuses a config that describes no training."""
    if not config.task.get("name"):
        raise UserError("--config: it has no training part, for its task.name is empty; --what sample takes a --model")


def _step(config: Config, mesh: Mesh) -> Any:
    task, optimizer = make_task(config, mesh), make_optimizer(config.optim, config.train.steps)
    decay, accumulate = config.optim.ema_decay, config.train.accumulate
    jitted: Any = make_step(task, optimizer, config.train.seed, decay=decay, accumulate=accumulate)
    return jitted.__wrapped__


def _without_remat(config: Config) -> Config:
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.train.remat = "none"
    return plain
