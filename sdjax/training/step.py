"""The state of a run and the one jitted step that changes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from sdjax.core.prng import stream
from sdjax.core.tree import Params, merge
from sdjax.parallel.trees import shapes_on, tree_shardings
from sdjax.training.task import Metrics, Task


class TrainState(NamedTuple):
    """All that a run must save to go on as if it had never stopped.

    Attributes:
        step: optimiser steps taken.
        params: float32 masters of the trainable components.
        ema: their exponential moving average, in float32.
        opt_state: of the optimiser.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: Any


StepFn = Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]
"""(state, frozen components, batch) -> the next state and what to log."""


def init_state(
    task: Task, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, initial: Params | None = None
) -> TrainState:
    """A fresh state, every array made directly where it will live: nothing is whole on one device.

    Args:
        initial: parameters that begin from these arrays; the others are drawn.
    """
    build, key, initial = _builder(task, optimizer), stream(seed, "init"), initial or {}
    shardings = tree_shardings(jax.eval_shape(build, key, initial), mesh)
    return jax.jit(build, out_shardings=shardings)(key, initial)


def state_shapes(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes of `init_state` with their shardings; no array is made, on whatever devices."""
    shapes = jax.eval_shape(_builder(task, optimizer), jax.eval_shape(jax.random.key, 0), {})
    return shapes_on(shapes, tree_shardings(shapes, mesh))


def _builder(task: Task, optimizer: optax.GradientTransformation) -> Callable[[PRNGKeyArray, Params], TrainState]:
    def build(key: PRNGKeyArray, initial: Params) -> TrainState:
        params = merge(task.init(key), initial)
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    return build


def ema_decay(step: Int[Array, ""], decay: float) -> Array:
    """min(decay, (1 + n) / (10 + n)): early averages forget the random start (CompVis/latent-diffusion, ema.py)."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_step(
    task: Task, optimizer: optax.GradientTransformation, seed: int, *, decay: float, accumulate: int = 1
) -> StepFn:
    """The training step, jitted, its state donated.

    Args:
        task: what is trained.
        optimizer: how.
        seed: of all randomness in the loss; step n always draws the same.
        decay: of the moving average.
        accumulate: how many equal parts a batch is worked through in; the gradient is their mean.
    """

    def gradients(
        params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, count: Array
    ) -> tuple[Params, Metrics]:
        def loss(params: Params) -> tuple[Array, Metrics]:
            value, metrics = task.loss(merge(frozen, params), batch, key, count)
            return value, {"loss": value, **metrics}

        return jax.grad(loss, has_aux=True)(params)

    def accumulated(
        params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, count: Array
    ) -> tuple[Params, Metrics]:
        parts = jax.tree.map(lambda rows: _interleaved(rows, accumulate), batch)

        def add(total: Any, part: tuple[Any, Array]) -> tuple[Any, None]:
            rows, index = part
            result = gradients(params, frozen, rows, jax.random.fold_in(key, index), count)
            return jax.tree.map(jnp.add, total, result), None

        first = jax.tree.map(lambda rows: rows[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, params, frozen, first, key, count))
        total, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))
        return jax.tree.map(lambda value: value / accumulate, total)

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key = stream(seed, "train", state.step)
        grads, metrics = (gradients if accumulate == 1 else accumulated)(state.params, frozen, batch, key, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        kept = ema_decay(state.step, decay)
        ema = jax.tree.map(lambda average, new: average * kept + new * (1.0 - kept), state.ema, params)
        metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, cast(Params, params), ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _interleaved(rows: Array, parts: int) -> Array:
    """[b ...] to [parts b/parts ...] so that every device keeps its own rows in every part."""
    return jnp.swapaxes(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 0, 1)
