"""A1111's names of samplers and noise schedules (modules/sd_samplers_*.py, modules/sd_schedulers.py), and the lists."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from sdjax.cli.records import SAMPLER_LABELS, SCHEDULE_LABELS
from sdjax.cli.settings.names import A1111
from sdjax.cli.settings.settings import Settings
from sdjax.core.errors import UserError
from sdjax.serve.api.a1111.fields import SamplerItem, SchedulerItem

AUTOMATIC = "automatic"
PLACE = "the request"
# Of Karras et al. 2022, by whose name A1111's schedules are called; it lists the exponent.
RHO = {"karras": 7.0}
# Samplers that read eta; the others' is passed over, as A1111 does.
STOCHASTIC = ("ddim", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "tcd")


def sampling_of(sampler: str | None, schedule: str | None) -> tuple[dict[str, Any], list[str]]:
    """Options `sampler` and `schedule` of names that A1111 knows, and notes; left out is the checkpoint's choice.

    Older names have the schedule after the sampler's ("DPM++ 2M Karras").

    Raises:
        HTTPException: 404, the sampler is not known.
        UserError: the schedule is not known.
    """
    schedule = (schedule or "").strip()
    if not sampler and schedule.casefold() == AUTOMATIC:
        return {}, []
    found = Settings(PLACE, A1111)
    found.put_sampler(sampler, schedule)
    if "sampler" in found.refused:
        raise HTTPException(404, "Sampler not found")
    if found.refused:
        raise found.refused["schedule"]
    return dict(found.values), found.notes


def noise_of(sampler: str | None, eta: float | None, s_noise: float | None, s_churn: float | None) -> dict[str, Any]:
    """Options of a sampler's noise that this one reads; a UserError where it would need churn."""
    if s_churn and s_churn > 0.0:
        raise UserError(f"s_churn {s_churn:g}: churn is not done here; leave it out")
    options = {}
    if eta is not None and sampler in STOCHASTIC:
        options["eta"] = eta
    if s_noise not in (None, 1.0):
        options["s_noise"] = s_noise
    return options


def samplers() -> list[SamplerItem]:
    """All samplers, each with the schedule that "automatic" means for it."""
    return [
        SamplerItem(
            name=label,
            aliases=[other for other, own in A1111.samplers.items() if own == name and other != label.casefold()],
            options={"scheduler": A1111.automatic[name]} if name in A1111.automatic else {},
        )
        for name, label in SAMPLER_LABELS.items()
    ]


def schedulers() -> list[SchedulerItem]:
    """All noise schedules; the first leaves the choice to the sampler."""
    own = {AUTOMATIC: "Automatic", **SCHEDULE_LABELS}
    return [
        SchedulerItem(
            name=name,
            label=label,
            aliases=[other for other, ours in A1111.schedules.items() if ours == name and other != name] or None,
            default_rho=RHO.get(name),
            need_inner_model=False,
        )
        for name, label in own.items()
    ]
