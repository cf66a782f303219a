"""What a scheduler_config.json says about sampling, under its own field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.denoise import check_prediction
from sdjax.diffusion.schedule import Schedule, make_schedule

_CHOICES = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun"),
    "solver_order": (1, 2),
}


@dataclass(frozen=True)
class SamplerOptions:
    """Settings of samplers; each reads its own and ignores the rest. Names are those of diffusers' scheduler configs.

    eta is DDIM's (0 deterministic, 1 as random as DDPM) or the ancestral samplers' share of fresh noise. s_churn,
    s_tmin, s_tmax and s_noise are the churn of Euler, Heun and DPM2 (Karras et al. 2022, algorithm 2).

    Raises:
        UserError: a name is not among its choices.
    """

    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False
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
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -float("inf")
    beta_schedule: str = "linear"
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
        class_name, defaults, fields = _CLASSES[sampler]
        known = {name: config[name] for name in (*_COMMON, *fields) if config.get(name) is not None}
        if config.get("_class_name") in (None, class_name):
            _check_supported(config)
        if "lambda_min_clipped" in known:
            known["lambda_min_clipped"] = float(known["lambda_min_clipped"])
        if known.get("solver_type") in ("logrho", "bh1", "bh2"):
            known["solver_type"] = "midpoint"
        return cls(**{**defaults, **known})

    @property
    def limits(self) -> tuple[float, float, float]:
        """Clip range, dynamic threshold's ratio and greatest value: (inf, 0, 1) is neither. The dynamic one wins."""
        if self.thresholding:
            return (float("inf"), self.dynamic_thresholding_ratio, self.sample_max_value)
        return (self.clip_sample_range if self.clip_sample else float("inf"), 0.0, 1.0)


_COMMON = ("prediction_type", "timestep_spacing", "steps_offset")
_CLIP = ("clip_sample", "clip_sample_range")
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_SOLVER = ("solver_order", "solver_type", "lower_order_final", "euler_at_final", "lambda_min_clipped", "beta_schedule")
_LEADING: dict[str, Any] = {"timestep_spacing": "leading"}

# Sampler: diffusers' class, where its defaults differ from SamplerOptions', and the further fields it knows.
_CLASSES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ddpm": ("DDPMScheduler", {**_LEADING, "clip_sample": True}, (*_CLIP, *_THRESHOLD, "variance_type")),
    "ddim": (
        "DDIMScheduler",
        {**_LEADING, "clip_sample": True, "set_alpha_to_one": True},
        (*_CLIP, *_THRESHOLD, "set_alpha_to_one"),
    ),
    "plms": ("PNDMScheduler", _LEADING, ("skip_prk_steps", "set_alpha_to_one")),
    "lms": ("LMSDiscreteScheduler", {}, ("use_karras_sigmas",)),
    "euler": (
        "EulerDiscreteScheduler",
        {},
        ("use_karras_sigmas", "sigma_min", "sigma_max", "final_sigmas_type"),
    ),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"eta": 1.0}, ()),
    "heun": ("HeunDiscreteScheduler", {}, ("use_karras_sigmas", *_CLIP)),
    "dpm2": ("KDPM2DiscreteScheduler", {}, ("use_karras_sigmas",)),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {},
        ("use_karras_sigmas", "final_sigmas_type", *_THRESHOLD, *_SOLVER),
    ),
}

# Settings whose other values change the picture and which no sampler here follows.
_ONLY: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
}


def sampler_of(config: Mapping[str, Any]) -> str:
    """The name of the sampler that a scheduler_config.json asks for by its _class_name.

    Raises:
        UserError: a class that is not known, or none.
    """
    class_name = config.get("_class_name")
    names = {row[0]: sampler for sampler, row in _CLASSES.items()}
    if class_name not in names:
        raise unknown("scheduler class", class_name, names, "scheduler_config.json")
    return names[class_name]


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule that a scheduler_config.json describes, with the defaults of its class.

    Raises:
        UserError: an unknown beta_schedule, or betas given one by one.
    """
    if config.get("trained_betas") is not None:
        raise UserError("scheduler_config.json: trained_betas is not supported; choose a beta_schedule")
    second_order = config.get("_class_name") in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")
    return make_schedule(
        config.get("beta_schedule", "linear"),
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 0.00085 if second_order else 0.0001),
        config.get("beta_end", 0.012 if second_order else 0.02),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    for name, values in _ONLY.items():
        if config.get(name) is not None and config[name] not in values:
            raise unknown(name, config[name], map(str, values), "scheduler_config.json")
