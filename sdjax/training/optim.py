"""The optimiser of a config's `optim` section: AdamW, Muon or Adafactor with warm-up, a schedule and clipping."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib

from sdjax.core.config import Config
from sdjax.core.errors import unknown

SCHEDULES = ("constant", "cosine")

logger = logging.getLogger("sdjax")


def learning_rate(optim: Config, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `optim.learning_rate`, then constant or a cosine to `optim.final_fraction` of it.

    Raises:
        UserError: `optim.schedule` is unknown.
    """
    peak, warmup = optim.learning_rate, optim.warmup_steps
    if optim.schedule == "constant":
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup])
    if optim.schedule == "cosine":
        total = max(steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, peak * optim.final_fraction)
    raise unknown("learning-rate schedule", optim.schedule, SCHEDULES, "config.optim.schedule")


def learning_rates(optim: Config, steps: int) -> dict[str, optax.Schedule]:
    """The rate of the optimiser, and that of each network with its own, by their names among the metrics."""
    own = {f"learning_rate_{name}": _changed(optim, name) for name in optim.components}
    return {name: learning_rate(section, steps) for name, section in {"learning_rate": optim, **own}.items()}


def warn_of_changed_rates(optim: Config, before: int, steps: int, start: int) -> None:
    """Says where a run of `before` steps goes on as one of `steps` with other learning rates, from step `start`."""
    points = (start, min(before, steps))
    was, now = (
        {
            name: [float(np.asarray(rate(step))) for step in points]
            for name, rate in learning_rates(optim, count).items()
        }
        for count in (before, steps)
    )
    for name in was:
        if was[name] != now[name]:
            logger.warning(
                "config.train.steps was %d and is %d, which changes config.optim.schedule=%r: the %s of the next step "
                "is %.3g, and would have been %.3g",
                *(before, steps, optim.schedule, name.replace("_", " "), now[name][0], was[name][0]),
            )


def make_optimizer(optim: Config, steps: int) -> optax.GradientTransformation:
    """Gradient clipping, then the optimiser called `optim.name`; networks in `optim.components` have their own.

    Raises:
        UserError: `optim.name` or what `optim.components` changes is unknown.
    """
    changed = {name: _changed(optim, name) for name in optim.components}
    rest = _one(optim, steps)
    if not changed:
        return rest
    own = {name: _one(section, steps) for name, section in changed.items()}
    return optax.partition({**own, "": rest}, lambda params: {name: name if name in own else "" for name in params})


def _changed(optim: Config, name: str) -> Config:
    section = optim.copy_and_resolve_references()
    for key, value in optim.components[name].items():
        if key not in section or key in ("components", "ema_decay"):
            raise unknown("setting", key, optim, f"config.optim.components.{name}")
        section[key] = value
    return section


def _one(optim: Config, steps: int) -> optax.GradientTransformation:
    if optim.name not in OPTIMIZERS:
        raise unknown("optimizer", optim.name, OPTIMIZERS, "config.optim.name")
    rate = learning_rate(optim, steps)
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), OPTIMIZERS[optim.name](optim, rate))


def adamw(optim: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019); norms and biases do not decay."""
    return optax.adamw(rate, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=_matrices)


def muon(optim: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices and convolutions, AdamW at a tenth of its rate for the rest.

    It takes more arithmetic a step, which costs little where a network has few parameters for its activations.
    """
    return optax.contrib.muon(
        rate,
        weight_decay=optim.weight_decay,
        adam_b1=optim.b1,
        adam_b2=optim.b2,
        adam_learning_rate=lambda step: 0.1 * rate(step),
        muon_weight_dimension_numbers=_inputs_to_outputs,
    )


def adafactor(optim: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018), as T5 and Imagen's base were trained: the rate is a share of each parameter."""
    return optax.adafactor(rate, weight_decay_rate=optim.weight_decay or None, weight_decay_mask=_matrices)


OPTIMIZERS = {"adamw": adamw, "muon": muon, "adafactor": adafactor}


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _inputs_to_outputs(params: Any) -> Any:
    """Kernels as matrices from all inputs (of a convolution: of all its taps) to outputs; embeddings are none."""

    def dimensions(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if leaf.ndim < 2 or path[-1].key != "kernel":
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(dimensions, params)
