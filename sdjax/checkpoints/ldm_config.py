"""The `.yaml` beside a single file, as A1111 reads it: a config of LDM's, or of its successor (sgm).

It says of a model what tensors do not: the prediction, the betas of its noise schedule, the scale of its latents.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.core.errors import UserError, unknown
from sdjax.core.untrusted import read_yaml

logger = logging.getLogger("sdjax")

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # classes of sgm's denoiser_scaling.py
# LDM's "linear" is linear in the roots of betas (ldm/modules/diffusionmodules/util.py).
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
BETAS = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}


class LDMConfig(NamedTuple):
    """Facts of a model that its config gives; without one, none.

    Attributes:
        name: of the file.
        prediction: as diffusers names it.
        scheduler: entries of scheduler_config.json.
        scale: of the latents.
    """

    name: str = ""
    prediction: str | None = None
    scheduler: Mapping[str, Any] = {}
    scale: float | None = None


def config_beside(file: Path) -> LDMConfig:
    """The config of the model in a file.

    Raises:
        UserError: it is there and is not YAML, or a value is not one of a model that is here.
    """
    path = file.with_suffix(".yaml")
    if not path.is_file():
        return LDMConfig()
    content = read_yaml(path)
    params = _at(content, "model", "params")
    if not isinstance(params, Mapping):
        logger.info("%s, which stands beside %s, says nothing of a model", path.name, file.name)
        return LDMConfig()
    numbers = {key: _number(params, key, path) for key in (*BETAS, "scale_factor") if key in params}
    scheduler: dict[str, Any] = {name: numbers[key] for key, name in BETAS.items() if key in numbers}
    if "beta_schedule" in params:
        scheduler["beta_schedule"] = _choice(params["beta_schedule"], "beta_schedule", SCHEDULES, path)
    return LDMConfig(path.name, _prediction(params, path), scheduler, numbers.get("scale_factor"))


def _prediction(params: Mapping[str, Any], path: Path) -> str | None:
    """LDM's models predict the noise unless they say otherwise; sgm's say it by a class."""
    if "denoiser_config" in params:
        target = _at(params, "denoiser_config", "params", "scaling_config", "target")
        return None if target is None else _choice(str(target).split(".")[-1], "scaling_config", SCALINGS, path)
    return _choice(params.get("parameterization", "eps"), "parameterization", PREDICTIONS, path)


def _at(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _choice(value: Any, key: str, choices: Mapping[str, str], path: Path) -> str:
    if not isinstance(value, str) or value not in choices:
        raise unknown(key, value, choices, str(path))
    return choices[value]


def _number(params: Mapping[str, Any], key: str, path: Path) -> int | float:
    value = params[key]
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise UserError(f"{key} = {value!r} in {path} is no positive number")
    return value
