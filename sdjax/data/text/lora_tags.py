"""LoRAs that a prompt names: <lora:name:0.8>, as A1111 and the extension of block weights read them.

The numbers after the name are the strengths of the text encoders and of the UNet, which is the first where there is one
number (AUTOMATIC1111/stable-diffusion-webui extensions-builtin/Lora/extra_networks_lora.py); te= and unet= name them.
lbw= lists weights of the UNet's blocks, start= and stop= are the sampler's steps between which the LoRA acts
(hako-mikan/sd-webui-lora-block-weight).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from sdjax.core.errors import UserError, unknown

TAG = re.compile(r"<(?:lora|lyco):([^<>:]+)((?::[^<>:]*)*)>")
POSITIONAL = ("te", "unet")
NUMBERS = ("te", "unet", "start", "stop")


class LoraTag(NamedTuple):
    """A LoRA in a prompt.

    Attributes:
        name: as the prompt has it.
        text, unet: strengths.
        blocks: weights of blocks as they are written, e.g. "1,0,0.5" or "ALL"; None for none.
        start, stop: steps, from 0; None for the first, and for none.
    """

    name: str
    text: float = 1.0
    unet: float = 1.0
    blocks: str | None = None
    start: int | None = None
    stop: int | None = None


def read_tags(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its tags, and the LoRAs that they name.

    Raises:
        UserError: an argument of a tag is not known, or no number.
    """
    return TAG.sub("", prompt), [_tag(match) for match in TAG.finditer(prompt)]


def _tag(match: re.Match[str]) -> LoraTag:
    place, given = match[0][:80], dict[str, str]()
    free = list(POSITIONAL)
    for part in match[2].split(":")[1:]:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if not free:
                raise UserError(f"{part!r} in {place} is one number too many; there are two, of text encoders and UNet")
            name, value = free.pop(0), name
        if name not in (*NUMBERS, "lbw"):
            raise unknown("argument", name, (*NUMBERS, "lbw"), place)
        given[name] = value
    blocks = given.pop("lbw", None)
    numbers = {name: _number(name, value, place) for name, value in given.items()}
    text = numbers.get("te", 1.0)
    start, stop = (None if numbers.get(name) is None else int(numbers[name]) for name in ("start", "stop"))
    return LoraTag(match[1].strip(), text, numbers.get("unet", text), blocks, start, stop)


def _number(name: str, text: str, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} {text!r} in {place}: choose a number")
    return number
