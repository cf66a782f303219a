"""Settings for models that were distilled to few steps: their authors', by scheduler or by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.diffusion.samplers import sampler_of

logger = logging.getLogger("sdjax")


class Distilled(NamedTuple):
    """A way of distilling, and how its models are sampled.

    Attributes:
        steps, guidance_scale: 0 is none.
        sampler, schedule: for single files, which have no scheduler config.
    """

    steps: int
    guidance_scale: float
    sampler: str
    schedule: str | None


# By sampler: luosimiao's LCM (diffusers, LatentConsistencyModelPipeline) and jabir-zheng's TCD.
SAMPLED = {"lcm": Distilled(4, 8.5, "lcm", None), "tcd": Distilled(4, 0.0, "tcd", None)}
FEW = r"(?<!\d)([1-8])[ _-]?steps?(?![a-z])"
# By name. A word alone is also in names of plain models: it counts with the number of steps, as ByteDance's
# (SDXL-Lightning, Hyper-SD) and tianweiy's (DMD2) files have it; Stability's Turbo by its whole name; LCM is no word.
NAMED = (
    ("lightning", rf"(?i)lightning.*{FEW}|{FEW}.*lightning", Distilled(4, 0.0, "euler", "trailing")),
    ("hyper", rf"(?i)hyper.*{FEW}|{FEW}.*hyper", Distilled(8, 0.0, "ddim", "trailing")),
    ("dmd", rf"(?i)dmd.*{FEW}|{FEW}.*dmd", Distilled(4, 0.0, "lcm", None)),
    ("turbo", r"(?i)(?<![a-z])sd[ _-]?(xl)?[ _-]?turbo(?![a-z])", Distilled(4, 0.0, "euler_a", "trailing")),
    ("lcm", r"(?<![a-zA-Z])lcm(?![a-z])|(?<![A-Z])LCM(?![a-z])", SAMPLED["lcm"]),
)
AMBIGUOUS = re.compile("lightning|turbo", re.IGNORECASE)


def few_step_defaults(
    name: str, scheduler_config: Mapping[str, Any], guidance_condition: bool, single_file: bool
) -> dict[str, Any]:
    """Steps, guidance_scale, and of a single file sampler and schedule; {} for a model that is not distilled.

    Args:
        name, scheduler_config: of the checkpoint.
        guidance_condition: whether the UNet is conditioned on the guidance scale, as LCMs are.
        single_file: whether `scheduler_config` is not the checkpoint's own.
    """
    own = SAMPLED.get("lcm" if guidance_condition else sampler_of(scheduler_config))
    word, found = next(((word, way) for word, sign, way in NAMED if re.search(sign, name)), ("few-step", own))
    if found is None:
        if word := AMBIGUOUS.search(name):
            logger.info("%s is sampled as a plain model; if it is a %s one, give steps and guidance", name, word[0])
        return {}
    steps = re.search(FEW, name, re.IGNORECASE)
    # An LCM without that condition is one by LoRA, which has learned to do without guidance.
    plain = found.sampler == "lcm" and not guidance_condition
    chosen: dict[str, Any] = {"steps": int(steps[1]) if steps else found.steps}
    chosen["guidance_scale"] = 1.0 if plain else found.guidance_scale
    if single_file:
        chosen["sampler"] = found.sampler
        chosen |= {} if found.schedule is None else {"schedule": found.schedule}
    said = ", ".join(f"{key} {value}" for key, value in chosen.items())
    logger.info("%s is sampled as a %s model: %s", name, word, said)
    return chosen
