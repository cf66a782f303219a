"""Ranges of the numbers in a config, checked before anything is read or compiled."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sdjax.core.config import Config
from sdjax.core.errors import UserError


class Limit(NamedTuple):
    """Numbers that make sense: from `least` on and below `bound`, `least` itself left out if it is `excluded`."""

    kind: type
    least: float
    bound: float = math.inf
    excluded: bool = False
    note: str = ""


OFF = Limit(int, 0, note=" (0: never)")
SHARE, POSITIVE, SOME = Limit(float, 0.0, bound=1.0), Limit(float, 0.0, excluded=True), Limit(float, 0.0)
LIMITS = {
    "train.steps": Limit(int, 1),
    "train.batch_size": Limit(int, 1),
    "train.accumulate": Limit(int, 1),
    "train.seed": Limit(int, 0, bound=2**32),
    "train.log_every": OFF,
    "train.sample_every": OFF,
    "train.checkpoint_every": OFF,
    "train.keep_checkpoints": Limit(int, 1, note=" (to retain all, a large number)"),
    "data.threads": Limit(int, 1),
    "data.workers": Limit(int, 0),
    "data.minimum_side": Limit(int, 0),
    "optim.learning_rate": SOME,
    "optim.warmup_steps": Limit(int, 0),
    "optim.final_fraction": SOME,
    "optim.b1": SHARE,
    "optim.b2": SHARE,
    "optim.eps": SOME,
    "optim.weight_decay": SOME,
    "optim.clip_norm": POSITIVE,
    "optim.ema_decay": SHARE,
}
"""Dotted keys of numbers whose limits do not depend on a system."""


def check_limits(config: Config) -> None:
    """Checks the numbers of `LIMITS`, for all networks and for those in `optim.components`.

    Raises:
        UserError: one is out of its range, or of another type; or the parts of a batch do not divide it.
    """
    for key, limit in LIMITS.items():
        section, name = key.split(".")
        _check(f"config.{key}", config[section][name], limit)
        for component, changed in config.optim.components.items() if section == "optim" else ():
            if name in changed:
                _check(f"config.optim.components.{component}.{name}", changed[name], limit)
    size, parts = config.train.batch_size, config.train.accumulate
    if size % parts:
        raise UserError(f"config.train.accumulate={parts} does not divide config.train.batch_size={size}")


def _check(place: str, value: Any, limit: Limit) -> None:
    kinds = (int,) if limit.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{place}={value!r} is not {'an integer' if limit.kind is int else 'a number'}{limit.note}")
    is_above = limit.least < value if limit.excluded else limit.least <= value
    if not (is_above and value < limit.bound):
        least = f"more than {limit.least:g}" if limit.excluded else f"at least {limit.least:g}"
        most = "" if math.isinf(limit.bound) else f" and below {limit.bound:g}"
        raise UserError(f"{place}={value!r} must be {least}{most}{limit.note}")


def is_due(step: int, every: int) -> bool:
    """True if what happens every so many steps does at this one; with 0 it never does."""
    return every > 0 and step % every == 0
