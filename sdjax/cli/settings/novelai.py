"""NovelAI's texts: the prompt in `Description`, JSON in `Comment`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.cli.settings.names import NOVELAI
from sdjax.cli.settings.settings import Settings
from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

NUMBERS = {"steps": "steps", "scale": "guidance_scale", "cfg_rescale": "guidance_rescale", "strength": "strength"}
FOLLOWED = {*NUMBERS, "seed", "width", "height", "sampler", "noise_schedule", "prompt", "uc", "v4_prompt"}
FOLLOWED |= {"v4_negative_prompt", "signed_hash", "request_type"}


def read(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of the texts `Comment` and `Description`; a UserError where they are damaged."""
    content = parse_json(texts["Comment"].encode(), f"NovelAI's comment of {place}")
    if not isinstance(content, dict):
        raise UserError(f"the settings of {place} are damaged: NovelAI's comment is no JSON object")
    found = Settings(place, NOVELAI)
    prompt = _caption(content.get("v4_prompt")) or texts.get("Description") or content.get("prompt")
    found.put_prompts(prompt, _caption(content.get("v4_negative_prompt")) or content.get("uc"))
    found.put_all(NUMBERS, content)
    found.put_seed(content.get("seed"))
    found.put_size(content.get("width"), content.get("height"))
    found.put_sampler(content.get("sampler"), content.get("noise_schedule"))
    found.put("model", texts.get("Source"))
    found.notes.append("the noise of its seeds is NovelAI's own, so images differ")
    found.note_others({name: value for name, value in content.items() if name not in FOLLOWED})
    return found


def _caption(prompt: Any) -> str:
    """Version 4's prompt: a caption of all, and one of each character."""
    caption = prompt.get("caption") if isinstance(prompt, dict) else None
    if not isinstance(caption, dict):
        return ""
    characters = caption.get("char_captions")
    parts = [caption.get("base_caption")]
    parts += (
        [part.get("char_caption") for part in characters if isinstance(part, dict)]
        if isinstance(characters, list)
        else []
    )
    return ", ".join(part for part in parts if isinstance(part, str) and part)
