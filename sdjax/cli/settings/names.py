"""Names that programs have for samplers, noise schedules and layers, by ours; data, and the two functions that read it.

Sources: AUTOMATIC1111/stable-diffusion-webui modules/sd_samplers_*.py, sd_schedulers.py, sd_hijack_*.py;
lllyasviel/stable-diffusion-webui-forge, the same files, and its backend/text_processing; vladmandic/sdnext
modules/sd_samplers_diffusers.py; ComfyUI comfy/samplers.py and comfy/sd1_clip.py; lllyasviel/Fooocus modules/flags.py;
InvokeAI backend/stable_diffusion/schedulers; NovelAI's images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sdjax.cli.records import SAMPLER_LABELS, SCHEDULE_LABELS
from sdjax.cli.settings import emphasis
from sdjax.core.errors import unknown
from sdjax.diffusion.samplers import strength_of

OWN_TIMESTEPS = ("lcm", "tcd")
SHOWN = 80


def run_share(steps: int, strength: float) -> tuple[int, float]:
    """Diffusers, and so this program, runs int(strength steps) of the steps."""
    return steps, strength


class Dialect(NamedTuple):
    """Names and habits of a program.

    Attributes:
        samplers, schedules: our names by theirs in lower case. A schedule may end a sampler's name.
        automatic: schedules of samplers, where the text leaves them to the program.
        unnamed: the schedule of all others there; None for the checkpoint's own.
        fixed: schedules of samplers that follow no other there.
        clip_skip: of the layer that the text names, the one that skips none: of models that condition on their text
            encoder's last layer, and on the last but one; None where the program does not follow it.
        cpu_noise: whether its noise is always PyTorch's on a CPU.
        translate: a prompt to this program's syntax.
        img2img: steps and strength there to those that run as many here, for an image to begin from.
    """

    samplers: Mapping[str, str]
    schedules: Mapping[str, str]
    automatic: Mapping[str, str] = {}
    unnamed: str | None = None
    fixed: Mapping[str, str] = {}
    clip_skip: tuple[int, int | None] = (1, 1)
    cpu_noise: bool = False
    translate: Callable[[str], str] = emphasis.a1111
    img2img: Callable[[int, float], tuple[int, float]] = run_share


def run_one_more(steps: int, strength: float) -> tuple[int, float]:
    """A1111 runs int(strength steps) + 1 of the steps (modules/sd_samplers_common.py, setup_img2img_steps)."""
    return steps, strength_of(min(int(min(strength, 0.999) * steps) + 1, steps), steps)


def run_all(steps: int, strength: float) -> tuple[int, float]:
    """ComfyUI runs the last steps of int(steps / strength) (comfy/samplers.py, KSampler.set_steps)."""
    total = int(steps / strength) if strength > 0.0 else steps
    return total, strength_of(steps, total)


K_SAMPLERS = {
    **{"euler": "euler", "euler_ancestral": "euler_a", "heun": "heun", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a"},
    **{"lms": "lms", "dpmpp_2m": "dpmpp_2m", "dpmpp_2m_sde": "dpmpp_2m_sde", "dpmpp_3m_sde": "dpmpp_3m_sde"},
    **{"dpmpp_sde": "dpmpp_sde", "dpmpp_2s_ancestral": "dpmpp_2s_a"},
}
SAMPLERS = {
    **{label.casefold(): name for name, label in SAMPLER_LABELS.items()},
    **{name: name for name in SAMPLER_LABELS},
    **K_SAMPLERS,
    **{f"k_{label}": name for label, name in K_SAMPLERS.items()},
    **{"k_euler_a": "euler_a", "k_dpm_2_a": "dpm2_a", "k_dpmpp_2s_a": "dpmpp_2s_a", "k_heun": "heun"},
}
SCHEDULES = {
    **{label.casefold(): name for name, label in SCHEDULE_LABELS.items()},
    **{name: name for name in SCHEDULE_LABELS},
    **dict.fromkeys(("uniform", "normal"), "linspace"),
    **{"sgmuniform": "sgm_uniform", "align_your_steps": "ays", "align your steps sdxl": "ays_sdxl"},
    # Every T / n-th timestep, from the second on: leading, with Stable Diffusion's offset.
    **dict.fromkeys(("ddim", "ddim_uniform"), "leading"),
    "turbo": "trailing",
    # Its exponent is 1 where the text names none.
    "polyexponential": "exponential",
}
AUTOMATIC = {
    **dict.fromkeys(("dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2s_a", "dpmpp_sde"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
}
ON_TIMESTEPS = {"ddim": "leading", "plms": "leading", "unipc": "linspace"}

SDJAX = Dialect(SAMPLERS, SCHEDULES, AUTOMATIC, translate=emphasis.sdjax)
# Only Stable Diffusion 1 stops at the layer that the user names.
A1111 = Dialect(SAMPLERS, SCHEDULES, AUTOMATIC, "linspace", ON_TIMESTEPS, clip_skip=(1, None), img2img=run_one_more)
FORGE = A1111._replace(clip_skip=(1, 2))
SDNEXT = Dialect(
    {**SAMPLERS, "pndm": "plms", "kdpm2": "dpm2", "kdpm2 a": "dpm2_a", "dpm sde": "dpmpp_sde"},
    {**SCHEDULES, "default": ""},
)
COMFYUI = Dialect(
    {
        **K_SAMPLERS,
        **{f"{name}_gpu": name for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")},
        # A deterministic DDIM on any levels is Euler.
        **{"ddim": "euler", "ddpm": "ddpm", "uni_pc": "unipc", "uni_pc_bh2": "unipc", "lcm": "lcm", "deis": "deis"},
        "tcd": "tcd",
    },
    {name: SCHEDULES[name] for name in SCHEDULES if name not in ("ddim", "turbo")},
    unnamed="linspace",
    clip_skip=(1, 2),
    cpu_noise=True,
    translate=emphasis.comfyui,
    img2img=run_all,
)
FOOOCUS = COMFYUI._replace(
    samplers={**SAMPLERS, **COMFYUI.samplers}, schedules={**COMFYUI.schedules, "lcm": "", "tcd": ""}
)
INVOKEAI = Dialect(
    {
        **{name: name for name in SAMPLER_LABELS},
        **{"pndm": "plms", "kdpm_2": "dpm2", "kdpm_2_a": "dpm2_a", "k_lms": "lms", "k_euler": "euler"},
        **{"k_euler_a": "euler_a", "k_heun": "heun", "k_dpm_2": "dpm2", "k_dpm_2_a": "dpm2_a"},
        **{"k_dpmpp_2": "dpmpp_2m", "k_dpmpp_2_a": "dpmpp_2s_a"},
    },
    {"k": "karras", "karras": "karras"},
    clip_skip=(0, None),
    translate=emphasis.invokeai,
)
NOVELAI = Dialect(
    {**SAMPLERS, "ddim_v3": "ddim"},
    {**SCHEDULES, "native": "linspace"},
    unnamed="linspace",
    fixed=ON_TIMESTEPS,
    translate=emphasis.novelai,
)


def sampler_of(dialect: Dialect, label: str, schedule: str, place: str) -> tuple[str, str]:
    """Our name of a sampler, and the schedule, which may end the sampler's name; a UserError: it is not known."""
    name = label.casefold()
    if name in dialect.samplers:
        return dialect.samplers[name], schedule
    for ending in dialect.schedules:
        for mark in " _":
            if name.endswith(mark + ending) and name.removesuffix(mark + ending) in dialect.samplers:
                return dialect.samplers[name.removesuffix(mark + ending)], ending
    raise unknown("sampler", label[:SHOWN], set(dialect.samplers.values()), place)


def schedule_of(dialect: Dialect, sampler: str | None, label: str, place: str) -> tuple[str | None, bool]:
    """Our name of a schedule, or None for the checkpoint's own, and whether it only follows from the sampler.

    Raises:
        UserError: it is not known.
    """
    name = label.casefold()
    if sampler is not None and sampler in dialect.fixed:
        return dialect.fixed[sampler], True
    if name == "automatic":
        return dialect.automatic.get(sampler or "", dialect.unnamed), True
    if not name:
        return dialect.unnamed, True
    if name not in dialect.schedules:
        raise unknown("schedule", label[:SHOWN], set(dialect.schedules.values()) - {""}, place)
    own = dialect.schedules[name]
    return own or dialect.unnamed, not own
