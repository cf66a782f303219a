"""InvokeAI's texts: `invokeai_metadata` of version 3 on, `sd-metadata` of version 2, and the command line of `Dream`.

invoke-ai/InvokeAI invokeai/app/invocations/metadata.py; docs/features/CLI.md of version 2.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from sdjax.cli.settings.names import INVOKEAI
from sdjax.cli.settings.settings import Settings, brief
from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

NUMBERS = {"steps": "steps", "cfg_scale": "guidance_scale", "cfg_rescale_multiplier": "guidance_rescale"}
NUMBERS |= {"strength": "strength", "refiner_start": "refiner_start"}
# Version 2's flags, by the keys of its JSON.
DREAM = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler", "f": "strength"}
NEGATIVE = re.compile(r"\[([^\[\]]*)\]")
# Mixtures of prompts, which have no counterpart here.
MIXED = re.compile(r"\)\.(?:blend|and|swap)\(")
FOLLOWED = {*NUMBERS, "seed", "width", "height", "scheduler", "sampler", "positive_prompt", "negative_prompt", "prompt"}
FOLLOWED |= {"clip_skip", "model", "rand_device"}


def read_metadata(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of the text `invokeai_metadata`; a UserError where it is damaged."""
    content = _object(texts["invokeai_metadata"], place)
    found = _read(content, content.get("scheduler"), place)
    _put_prompts(found, content.get("positive_prompt"), content.get("negative_prompt"))
    model = content.get("model")
    if isinstance(model, dict):
        found.put("model", model.get("name", model.get("model_name")))
    found.put_clip_skip(content.get("clip_skip"))
    found.note_others({name: value for name, value in content.items() if name not in FOLLOWED})
    return found


def read_sd_metadata(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of the text `sd-metadata`; a UserError where it is damaged."""
    content = _object(texts["sd-metadata"], place)
    image = content.get("image")
    if not isinstance(image, dict):
        raise UserError(f"the settings of {place} are damaged: their sd-metadata describe no image")
    found = _read(image, image.get("sampler"), place)
    prompts = image.get("prompt")
    prompts = prompts if isinstance(prompts, list) else [prompts]
    texts_of = [part.get("prompt") if isinstance(part, dict) else part for part in prompts]
    if len(texts_of) > 1:
        found.notes.append(f"{len(texts_of)} weighted prompts are read as one")
    _put_bracketed(found, ", ".join(str(text) for text in texts_of if text))
    found.put("model", content.get("model_weights"))
    found.note_others({name: value for name, value in image.items() if name not in FOLLOWED})
    return found


def read_dream(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of the text `Dream`, a quoted prompt and flags; a UserError where it is damaged."""
    try:
        words = shlex.split(texts["Dream"])
    except ValueError as error:
        raise UserError(f"the settings of {place} are damaged: {error}") from error
    flags: dict[str, str] = {}
    prompt = words[0] if words and not words[0].startswith("-") else ""
    for flag, value in zip(words, [*words[1:], ""], strict=False):
        match = re.fullmatch(r"-([A-Za-z])(.*)", flag)
        if match:
            flags[DREAM.get(match[1], f"-{match[1]}")] = match[2] or value
    found = _read(flags, flags.get("sampler"), place)
    _put_bracketed(found, prompt)
    found.note_others({name: value for name, value in flags.items() if name not in FOLLOWED})
    return found


def _object(text: str, place: str) -> dict[str, Any]:
    content = parse_json(text.encode(), f"InvokeAI's text of {place}")
    if not isinstance(content, dict):
        raise UserError(f"the settings of {place} are damaged: InvokeAI's text is no JSON object")
    return content


def _read(content: Mapping[str, Any], sampler: Any, place: str) -> Settings:
    found = Settings(place, INVOKEAI)
    found.put_all(NUMBERS, content)
    found.put_seed(content.get("seed"))
    found.put_size(content.get("width"), content.get("height"))
    found.put_sampler(sampler)
    if content.get("rand_device", "cpu") == "cpu":
        found.put("rng", "torch")
    else:
        found.notes.append(
            f"rand_device {brief(content['rand_device'])} is not followed: the noise of its seeds is a GPU's"
        )
    return found


def _put_bracketed(found: Settings, text: str) -> None:
    """Version 2's prompt, whose negative one stands in brackets (ldm/invoke/conditioning.py)."""
    positive = re.sub(" +", " ", NEGATIVE.sub(" ", text)).strip(" ,")
    _put_prompts(found, positive, " ".join(part.strip(" ,") for part in NEGATIVE.findall(text)))


def _put_prompts(found: Settings, positive: Any, negative: Any) -> None:
    found.put_prompts(positive, negative)
    if any(isinstance(text, str) and MIXED.search(text) for text in (positive, negative)):
        found.notes.append("blends and conjunctions of prompts are not followed; they are read as words")
