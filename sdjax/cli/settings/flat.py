"""JSON objects in `parameters`: Fooocus', RuinedFooocus' and SwarmUI's, whose samplers are ComfyUI's.

lllyasviel/Fooocus modules/meta_parser.py; runew0lf/RuinedFooocus; SwarmUI docs/Image Metadata Format.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.cli.settings.names import FOOOCUS
from sdjax.cli.settings.settings import Settings
from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

RESOLUTION = re.compile(r"\(?\s*'?(\d{1,6})'?\s*[,x*]\s*'?(\d{1,6})'?\s*\)?")


class Keys(NamedTuple):
    """Keys of a program's object; "" where it has none.

    Attributes:
        mark: the key by which it is known.
        prompt, negative: the first of them that is not empty; lists are joined.
        numbers: our names by its own.
        size: width and height, or one key of both.
    """

    mark: str
    prompt: tuple[str, ...]
    negative: tuple[str, ...]
    numbers: Mapping[str, str]
    size: tuple[str, ...] = ("width", "height")
    sampler: str = "sampler"
    model: str = "model"
    clip_skip: str = "clip_skip"

    @property
    def followed(self) -> set[str]:
        return {*self.prompt, *self.negative, *self.numbers, *self.size, self.sampler, self.model, self.clip_skip}


PROGRAMS = {
    "Fooocus": Keys(
        "base_model",
        # Styles and expansions are in the full prompts, which are what was encoded.
        ("full_prompt", "prompt"),
        ("full_negative_prompt", "negative_prompt"),
        {"guidance_scale": "guidance_scale", "steps": "steps"},
        ("resolution",),
        model="base_model",
    ),
    "RuinedFooocus": Keys(
        "base_model_name",
        ("Prompt",),
        ("Negative",),
        {"cfg": "guidance_scale", "steps": "steps", "denoise": "strength"},
        sampler="sampler_name",
        model="base_model_name",
    ),
    "SwarmUI": Keys(
        "cfgscale",
        ("prompt",),
        ("negativeprompt",),
        {"cfgscale": "guidance_scale", "steps": "steps", "initimagecreativity": "strength"},
        clip_skip="clipstopatlayer",
    ),
}


def read(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of a JSON object in the text `parameters`.

    Raises:
        UserError: it is none, or of a program that is not known here.
    """
    content = parse_json(texts["parameters"].encode(), f"the parameters text of {place}")
    if isinstance(content, dict):
        content = content.get("sui_image_params", content)
    program = next((keys for keys in PROGRAMS.values() if isinstance(content, dict) and keys.mark in content), None)
    if program is None:
        known = ", ".join(PROGRAMS)
        raise UserError(f"the parameters text of {place} is JSON of a program that is not known here; known: {known}")
    found = Settings(place, FOOOCUS)
    found.put_prompts(_first(content, program.prompt), _first(content, program.negative))
    found.put_all(program.numbers, content)
    found.put_seed(content.get("seed"))
    found.put("model", content.get(program.model))
    found.put_sampler(content.get(program.sampler), content.get("scheduler"))
    stop = content.get(program.clip_skip)
    # Some count layers from the end as Python does.
    found.put_clip_skip(abs(stop) if isinstance(stop, int) else stop)
    size = [content.get(name) for name in program.size]
    if len(size) == 1:
        match = RESOLUTION.fullmatch(str(size[0]))
        size = list(match.groups()) if match else [None, None]
    found.put_size(*size)
    found.put("rng", "torch")
    found.note_others({n: v for n, v in content.items() if n not in program.followed | {"seed", "scheduler"}})
    return found


def _first(content: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first text that is not empty; the parts of a list are parts of it."""
    text = next((content[name] for name in names if content.get(name)), "")
    return ", ".join(filter(None, map(str, text))) if isinstance(text, list) else text
