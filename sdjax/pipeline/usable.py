"""Options that change something: those that a model reads, and that go with the others of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdjax.core.errors import UserError
from sdjax.pipeline.options import OPTIONS

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline

CONTROLS = tuple(name for name in OPTIONS if name.startswith("control_"))
# Options by the part of a model without which they change nothing, in words and as an option that it reads.
PARTS = {
    "classifier_scale": ("a classifier", "classifier_scale"),
    **dict.fromkeys(CONTROLS, ("a controlnet", "control_image")),
    **dict.fromkeys(("ip_image", "ip_scale", "ip_blocks"), ("an IP-Adapter", "ip_image")),
    **dict.fromkeys(("t2i_image", "t2i_scale", "t2i_factor"), ("a T2I-Adapter", "t2i_image")),
}
# Options by the other without which they change nothing.
BESIDE = {
    "mask": ("an init_image whose unmasked part is kept", "init_image"),
    **dict.fromkeys(("feather", "masked_content"), ("a mask", "mask")),
    "ip_scale": ("an ip_image", "ip_image"),
    "ip_blocks": ("an ip_image", "ip_image"),
    "t2i_scale": ("a t2i_image", "t2i_image"),
    "t2i_factor": ("a t2i_image", "t2i_image"),
    **dict.fromkeys(("hires_strength", "hires_steps"), ("hires", "hires")),
}


def known_inputs(pipe: Pipeline) -> set[str]:
    """Options that the conditions of a model and of its refiner read."""
    return set(pipe.inputs) | (set() if pipe.refiner is None else set(pipe.refiner.inputs))


def usable_options(pipe: Pipeline) -> list[str]:
    """Options of an image that can change one of this model's, in the order of the table."""
    known = known_inputs(pipe)
    idle = {name for name, (_, part) in PARTS.items() if part not in known}
    if pipe.refiner is None:
        idle.add("refiner_start")
    if not pipe.begins_from_images:
        idle |= {"strength", "mask", "masked_content", "feather", "hires", "hires_strength", "hires_steps"}
        if "init_image" not in known:
            idle.add("init_image")
    return [
        name
        for name, option in OPTIONS.items()
        if option.scope == "image" and name not in idle and (name in known or not option.condition)
    ]


def check_used(pipe: Pipeline, given: Mapping[str, Any]) -> None:
    """Hold a call to options that change something.

    Raises:
        UserError: one changes nothing for this model, or without another.
    """
    known = known_inputs(pipe)
    for name, value in given.items():
        shown = f"{name} {value!r}" if isinstance(value, int | float | tuple) else name
        idle = f"{shown} changes nothing"
        if OPTIONS[name].condition and name not in known:
            raise UserError(f"{idle}: {pipe.name} is conditioned on {required_names(pipe)}; leave it out")
        needed = _missing(pipe, name, given, known)
        if needed:
            raise UserError(f"{idle} without {needed}; leave it out")
    if "mask" in given and not pipe.begins_from_images:
        raise UserError(f"mask changes nothing: {pipe.name} enlarges its init_image; leave it out")


def required_names(pipe: Pipeline) -> str:
    """Inputs that a model needs, for messages."""
    return ", ".join(pipe.model.conditioner.traits.required) or "nothing"


def _missing(pipe: Pipeline, name: str, given: Mapping[str, Any], known: set[str]) -> str:
    """In words, what an option lacks to change something; "" if nothing."""
    other, beside = BESIDE.get(name, ("", ""))
    if beside and beside not in given:
        return other
    part, reads = PARTS.get(name, ("", ""))
    if reads and reads not in known:
        return part
    if name == "strength" and not ("init_image" in given and pipe.begins_from_images):
        return "an init_image to begin from"
    if name == "refiner_start" and pipe.refiner is None:
        return "a refiner"
    if name == "torch_batch" and given.get("rng") != "torch":
        return 'rng="torch"'
    if name == "wildcard_dir" and given.get("syntax", "a1111") != "a1111":
        return 'syntax="a1111"'
    return ""
