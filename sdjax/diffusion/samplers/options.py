"""Sampling options of a scheduler_config.json, under its own field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.denoise import check_prediction
from sdjax.diffusion.samplers.noise_levels import SIGMA_SCHEDULES
from sdjax.diffusion.schedule import Schedule, make_schedule

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
MOST_TIMESTEPS = 100_000
"""More training timesteps than any model has; a damaged file must not ask for memory."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": TIMESTEP_SPACINGS,
    "sigma_schedule": (None, *SIGMA_SCHEDULES),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (1, 2, 3),
}


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """Settings of samplers; each reads its own and ignores the rest. Names are those of diffusers' scheduler configs.

    sigma_schedule is the one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and use_lu_lambdas that a
    file sets, or another key of SIGMA_SCHEDULES; None for the levels of spaced timesteps. eta is DDIM's (0
    deterministic, 1 as random as DDPM), the ancestral and SDE samplers' share of fresh noise, or TCD's gamma. s_churn,
    s_tmin, s_tmax and s_noise are the churn of Euler, Heun and DPM2 (Karras et al. 2022, algorithm 2); s_noise scales
    the fresh noise of the ancestral and SDE samplers as well. timesteps are those of DDPM, LCM and TCD in place of the
    spaced ones.

    Raises:
        UserError: a name is not among its choices, or a value is of the wrong type.
    """

    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    sigma_schedule: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False
    variance_type: str = "fixed_small"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    lambda_min_clipped: float = -float("inf")
    beta_schedule: str = "linear"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = float("inf")
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_prediction(self.prediction_type)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), map(str, choices))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], sampler: str | None = None) -> SamplerOptions:
        """The options of a checkpoint's scheduler, or of another sampler that takes its place.

        As diffusers' `Scheduler.from_config`: what the file says explicitly is kept where the sampler knows the field,
        everything else is the default of the sampler's own class.

        Args:
            config: the parsed scheduler_config.json.
            sampler: a name that takes the place of the file's own scheduler; None for `sampler_of(config)`.

        Raises:
            UserError: an unknown scheduler class or sampler, or a setting that no sampler here follows.
        """
        sampler = sampler or sampler_of(config)
        if sampler not in _CLASSES:
            raise unknown("sampler", sampler, _CLASSES)
        scheduler = _class_of(sampler, config)
        known = {name: config[name] for name in scheduler.fields if config.get(name) is not None}
        if config.get("_class_name") in (None, scheduler.name):
            for name, values in _ONLY.items():
                if config.get(name) not in (None, *values):
                    raise unknown(name, config[name], map(str, values), "scheduler_config.json")
        if "lambda_min_clipped" in known:
            known["lambda_min_clipped"] = _number(known["lambda_min_clipped"], "lambda_min_clipped")
        if "solver_type" in known:
            known["solver_type"] = _own_solver_type(known["solver_type"], scheduler)
        if isinstance(known.get("disable_corrector"), list):
            known["disable_corrector"] = tuple(known["disable_corrector"])
        if known.get("algorithm_type") in scheduler.other_algorithms:
            del known["algorithm_type"]
        named = [name for name in _SIGMAS if known.pop(name, False)]
        if len(named) > 1:
            raise UserError(f"scheduler_config.json: only one of {', '.join(named)} can be true")
        chosen = {"sigma_schedule": _SIGMAS[named[0]]} if named else {}
        return cls(**{**scheduler.defaults, **known, **chosen})

    @property
    def limits(self) -> tuple[float, float, float]:
        """Clip range, dynamic threshold's ratio and greatest value: (inf, 0, 1) is neither. The dynamic one wins."""
        if self.thresholding:
            return (float("inf"), self.dynamic_thresholding_ratio, self.sample_max_value)
        return (self.clip_sample_range if self.clip_sample else float("inf"), 0.0, 1.0)


class _Class(NamedTuple):
    """A scheduler class of diffusers: its name (None where it has none), where its defaults differ from
    SamplerOptions', the fields it knows, and algorithm types of its family that mean its own default."""

    name: str | None
    defaults: dict[str, Any]
    fields: tuple[str, ...]
    other_algorithms: tuple[str, ...] = ()


_SPACED = ("prediction_type", "timestep_spacing", "steps_offset")
_CLIP = ("clip_sample", "clip_sample_range")
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_PIXELS = (*_SPACED, *_CLIP, *_THRESHOLD)
_SWITCHES = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
_LU = {"use_lu_lambdas": "lu"}  # of the multistep class alone
_SIGMAS = _SWITCHES | _LU
_SIGMA_FAMILY = (*_SPACED, *_SWITCHES)
_ORDERS = ("solver_order", "solver_type", "lower_order_final", *_THRESHOLD, *_SWITCHES)
_SOLVER = ("algorithm_type", "final_sigmas_type", "lambda_min_clipped", *_ORDERS)
_MULTISTEP = (*_SPACED, *_SOLVER, "euler_at_final", "beta_schedule", *_LU)
_LEADING: dict[str, Any] = {"timestep_spacing": "leading"}
_ANCESTRAL: dict[str, Any] = {"eta": 1.0}
_SDE = "sde-dpmsolver++"
_OWN_SDE = {**_ANCESTRAL, "algorithm_type": _SDE}

_CLASSES: dict[str, _Class] = {
    "ddpm": _Class("DDPMScheduler", {**_LEADING, "clip_sample": True}, (*_PIXELS, "variance_type")),
    "ddim": _Class(
        "DDIMScheduler", {**_LEADING, "clip_sample": True, "set_alpha_to_one": True}, (*_PIXELS, "set_alpha_to_one")
    ),
    "plms": _Class("PNDMScheduler", _LEADING, (*_SPACED, "skip_prk_steps", "set_alpha_to_one")),
    "lms": _Class("LMSDiscreteScheduler", {}, _SIGMA_FAMILY),
    "euler": _Class("EulerDiscreteScheduler", {}, (*_SIGMA_FAMILY, "sigma_min", "sigma_max", "final_sigmas_type")),
    "euler_a": _Class("EulerAncestralDiscreteScheduler", _ANCESTRAL, _SPACED),
    "heun": _Class("HeunDiscreteScheduler", {}, (*_SIGMA_FAMILY, *_CLIP)),
    "dpm2": _Class("KDPM2DiscreteScheduler", {}, _SIGMA_FAMILY),
    "dpm2_a": _Class("KDPM2AncestralDiscreteScheduler", _ANCESTRAL, _SIGMA_FAMILY),
    "dpmpp_2s_a": _Class(None, _ANCESTRAL, _SIGMA_FAMILY),
    "dpmpp_sde": _Class("DPMSolverSDEScheduler", _ANCESTRAL, _SIGMA_FAMILY),
    "dpmpp_2m": _Class("DPMSolverMultistepScheduler", {}, _MULTISTEP, ("deis", _SDE)),
    "dpmpp_2m_sde": _Class("DPMSolverMultistepScheduler", _OWN_SDE, _MULTISTEP, ("deis", "dpmsolver", "dpmsolver++")),
    # k-diffusion's own: its first steps and its last are not those of a config.
    "dpmpp_3m_sde": _Class(
        "DPMSolverMultistepScheduler",
        {**_OWN_SDE, "solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        (*_SPACED, *_THRESHOLD, *_SIGMAS, "final_sigmas_type", "lambda_min_clipped", "beta_schedule"),
    ),
    "dpmpp_2s": _Class(
        "DPMSolverSinglestepScheduler",
        {**_ANCESTRAL, "lower_order_final": False},
        ("prediction_type", *_SOLVER),
        ("deis",),
    ),
    "unipc": _Class(
        "UniPCMultistepScheduler",
        {"solver_type": "bh2"},
        (*_SPACED, *_ORDERS, "predict_x0", "disable_corrector", "final_sigmas_type", "sigma_min", "sigma_max"),
    ),
    "deis": _Class(
        "DEISMultistepScheduler", {"solver_type": "logrho", "final_sigmas_type": "sigma_min"}, (*_SPACED, *_ORDERS)
    ),
    "lcm": _Class("LCMScheduler", _LEADING, (*_PIXELS, "original_inference_steps", "timestep_scaling")),
    "tcd": _Class("TCDScheduler", {**_LEADING, "eta": 0.3}, (*_SPACED, "original_inference_steps")),
}

# Karlo's, which is DDPM at other timesteps.
_UNCLIP = _Class(
    "UnCLIPScheduler",
    {"timestep_spacing": "linspace", "clip_sample": True, "variance_type": "fixed_small_log"},
    ("prediction_type", *_CLIP, "variance_type"),
)

# Settings whose other values change the image and which no sampler here follows.
_ONLY: dict[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "solver_p": (None,),
    "algorithm_type": ("deis", *_CHOICES["algorithm_type"]),
}

# Classes that follow rescale_betas_zero_snr; the others ignore it.
_ZERO_SNR = (
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
)

# beta_schedule, beta_start and beta_end where a class's defaults are not DDPM's.
_KARRAS = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
_BETAS = {
    **{f"{name}Scheduler": ("linear", 0.00085, 0.012) for name in _KARRAS},
    **{f"{name}Scheduler": ("scaled_linear", 0.00085, 0.012) for name in ("LCM", "TCD")},
    "UnCLIPScheduler": ("squaredcos_cap_v2", 0.0001, 0.02),
}


def sampler_of(config: Mapping[str, Any]) -> str:
    """The name of the sampler that a scheduler_config.json asks for by its _class_name and, for DPM-Solver++, its SDE.

    Raises:
        UserError: a class that is not known, or none.
    """
    class_name = config.get("_class_name")
    if class_name == "DPMSolverMultistepScheduler":
        if not str(config.get("algorithm_type")).startswith("sde-"):
            return "dpmpp_2m"
        return "dpmpp_3m_sde" if config.get("solver_order") == 3 else "dpmpp_2m_sde"
    rows = (*_CLASSES.items(), ("ddpm", _UNCLIP))
    names = {row.name: sampler for sampler, row in rows if row.name}
    if not isinstance(class_name, str) or class_name not in names:
        raise unknown("scheduler class", class_name, names, "scheduler_config.json")
    return names[class_name]


def _class_of(sampler: str, config: Mapping[str, Any]) -> _Class:
    """The class whose defaults and fields a sampler has beside a config."""
    return _UNCLIP if sampler == "ddpm" and config.get("_class_name") == _UNCLIP.name else _CLASSES[sampler]


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule that a scheduler_config.json describes, with the defaults of its class.

    Raises:
        UserError: an unknown beta_schedule, numbers that are none or out of range, or betas given one by one.
    """
    if config.get("trained_betas") is not None:
        raise UserError("scheduler_config.json: trained_betas is not supported; choose a beta_schedule")
    class_name = str(config.get("_class_name"))
    name, start, end = _BETAS.get(class_name, ("linear", 0.0001, 0.02))
    total = config.get("num_train_timesteps", 1000)
    if isinstance(total, bool) or not isinstance(total, int) or not 1 <= total <= MOST_TIMESTEPS:
        raise UserError(f"scheduler_config.json: num_train_timesteps {total!r}: choose 1 to {MOST_TIMESTEPS}")
    zero_snr = bool(config.get("rescale_betas_zero_snr")) and class_name in (str(None), *_ZERO_SNR)
    return make_schedule(
        str(config.get("beta_schedule", name)),
        total,
        _number(config.get("beta_start", start), "beta_start"),
        _number(config.get("beta_end", end), "beta_end"),
        zero_terminal_snr=zero_snr,
    )


def _own_solver_type(name: str, scheduler: _Class) -> str:
    """The class's own solver type where the file names another family's, as diffusers' constructors have it."""
    own = scheduler.defaults.get("solver_type", "midpoint")
    families = {"midpoint": ("midpoint", "heun"), "bh2": ("bh1", "bh2")}
    foreign = name in _CHOICES["solver_type"] and name not in families.get(own, (own,))
    return own if foreign else name


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"scheduler_config.json: {name} {value!r} is not a number") from None


def _check_type(name: str, value: Any, default: Any) -> None:
    """Refuses a value of another kind than its default's, as a damaged file has it."""
    if name in ("sigma_min", "sigma_max", "timesteps") and value is None:
        return
    if name in ("disable_corrector", "timesteps"):
        wanted, good = "integers", isinstance(value, tuple) and all(_is(int, item) for item in value)
    elif name in ("sigma_min", "sigma_max"):
        wanted, good = "a number above 0", _is((int, float), value) and 0.0 < value < float("inf")
    elif isinstance(default, float):
        endless = name in ("lambda_min_clipped", "s_tmax")
        wanted = "a number"
        good = _is((int, float), value) and value == value and (endless or abs(value) < float("inf"))
    elif isinstance(default, (bool, int)):
        wanted, good = f"of type {type(default).__name__}", _is(type(default), value)
    else:
        return
    if not good:
        raise UserError(f"{name} {value!r}: must be {wanted}")


def _is(kind: type | tuple[type, ...], value: Any) -> bool:
    """isinstance, where a bool is not an int."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
