"""A1111's text, and that of programs which write it too: Forge, SD.Next, Fooocus' second scheme, this one.

Two prompts and a line of settings (modules/processing.py, create_infotext, and modules/infotext_utils.py of
AUTOMATIC1111/stable-diffusion-webui; modules/processing_info.py of vladmandic/sdnext).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from sdjax.cli.records import CONTENT_LABELS, NEGATIVE
from sdjax.cli.settings.names import A1111, FOOOCUS, FORGE, SDJAX, SDNEXT, Dialect, run_share
from sdjax.cli.settings.settings import Settings, brief
from sdjax.core.errors import UserError
from sdjax.pipeline.options import OPTIONS

# A name, which may hold blanks and hyphens, and a value: a JSON string, an object, or all up to a comma that is not
# within a number.
SETTING = re.compile(
    r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"(?=\s*(?:,|$))|\{[^{}]*\}(?=\s*(?:,|$))|[^,]*(?:(?<=\d),(?=\d)[^,]*)*)'
)
SIZE = re.compile(r"(\d{1,6})\s*[x\u00d7]\s*(\d{1,6})")
# A1111's own least number of settings for a line to be one of settings; two of its own must be among them.
FEWEST_SETTINGS, FEWEST_CORE = 3, 2
CORE = {"steps", "sampler", "cfg scale", "seed", "size", "model", "model hash"}

NUMBERS = {option.label.casefold(): name for name, option in OPTIONS.items() if option.is_number and option.label}
NUMBERS |= {"image index": "index", "hires scale": "hires", "hires strength": "hires_strength"}
NUMBERS |= {"refiner switch at": "refiner_start"}
SCHEDULES = ("schedule type", "scheduler", "schedule", "sampler sigma", "sampler spacing")
SECOND_SIZES = ("hires resize", "hires fixed", "hires size")
FOLLOWED = {*NUMBERS, *SCHEDULES, *SECOND_SIZES, "first pass size", "eta ddim", "sampler", "size", "model", "rng"}
FOLLOWED |= {"clip skip"}
CONTENTS = {label: name for name, label in CONTENT_LABELS.items()}
# A first pass of size 0x0 had about as many pixels as Stable Diffusion 1 was trained on, in multiples of 64.
FIRST_PASS, FIRST_MULTIPLE = 512 * 512, 64
MOST_LINES = 4
BLANKS = " \t\n\0\ufeff"


class Parts(NamedTuple):
    """A text in its parts: prompts, settings by name, and the lines that follow those."""

    prompt: str
    negative: str
    settings: dict[str, str]
    rest: list[str]


def read(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of the text `parameters`.

    Raises:
        UserError: it has no line of settings, so another program wrote it.
    """
    parts = split(texts["parameters"])
    if not parts.settings:
        raise UserError(f"the parameters text of {place} has no line of settings: it is that of no program known here")
    settings = {name.casefold(): value for name, value in parts.settings.items()}
    found = Settings(place, dialect_of(settings))
    found.put_prompts(parts.prompt, parts.negative)
    found.put_all({theirs: ours for theirs, ours in NUMBERS.items() if ours != "seed"}, settings)
    found.put_seed(settings.get("seed"))
    found.put("model", settings.get("model"))
    found.put_clip_skip(settings.get("clip skip"))
    found.put_sampler(settings.get("sampler"), next(filter(None, map(settings.get, SCHEDULES)), None))
    if found.values.get("sampler") == "ddim":
        found.put("eta", settings.get("eta ddim"))
    content = settings.get("masked content", "")
    found.put("masked_content", CONTENTS.get(content))
    _put_size(found, settings.get("size"))
    _put_second_pass(found, settings)
    _put_noise(found, settings.get("rng"))
    own = {"hires upscaler"} if found.dialect is SDJAX else set()  # which knows one
    own |= {"masked content"} if content in CONTENTS else set()  # and not filling by colours
    found.note_others({n: value for n, value in parts.settings.items() if n.casefold() not in FOLLOWED | own})
    found.notes += [f"not followed: {brief(line)}" for line in parts.rest[:MOST_LINES] if line]
    return found


def split(text: str) -> Parts:
    """Parts of a text: its settings are the last line that reads like some."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip(BLANKS)
    lines = [line.strip() for line in text.split("\n")]
    for number in range(len(lines) - 1, -1, -1):
        settings = parse_settings(lines[number])
        if len(settings) >= FEWEST_SETTINGS and len(CORE & {name.casefold() for name in settings}) >= FEWEST_CORE:
            return Parts(*_prompts(lines[:number]), settings, lines[number + 1 :])
    return Parts(*_prompts(lines), {}, [])


def parse_settings(line: str) -> dict[str, str]:
    """The settings of a line; pieces between commas that are none are left out, and so is a name's second value."""
    found, at = {}, 0
    while at < len(line):
        match = SETTING.match(line, at)
        if match:
            name, value = match.groups()
            found.setdefault(name, _unquoted(value.strip()))
        comma = line.find(",", match.end() if match else at)
        at = len(line) if comma < 0 else comma + 1
    return found


def dialect_of(settings: Mapping[str, str]) -> Dialect:
    """The program that wrote a line of settings."""
    version = settings.get("version", "").casefold()
    if "image index" in settings:
        return SDJAX
    if settings.get("app", "").casefold() == "sd.next":
        return SDNEXT
    if version.startswith(("fooocus", "comfyui")):
        return FOOOCUS
    return FORGE if re.match(r"f\d|neo|forge", version) else A1111


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        text = json.loads(value)
    except ValueError:
        return value
    return text if isinstance(text, str) else value


def _prompts(lines: list[str]) -> tuple[str, str]:
    """The prompt, and the negative one that begins with the first line that says so."""
    mark = NEGATIVE.casefold()
    first = next((i for i, line in enumerate(lines) if line.casefold().startswith(mark)), len(lines))
    negative = "\n".join(lines[first:])[len(NEGATIVE) :].strip()
    return "\n".join(lines[:first]), negative


def _put_size(found: Settings, size: str | None) -> None:
    match = SIZE.fullmatch(size or "")
    if match and found.dialect is SDJAX:  # whose models have other factors, too
        found.put("width", match[1])
        found.put("height", match[2])
    elif match:
        found.put_size(match[1], match[2])
    elif size:
        found.notes.append(f"size {brief(size)} is not followed")


def _put_second_pass(found: Settings, settings: Mapping[str, str]) -> None:
    """The factor of a second pass, however the text names its size; the strength is then the second pass's."""
    values = found.values
    first = SIZE.fullmatch(settings.get("first pass size", ""))
    if first and "width" in values and "height" in values:
        second = values["width"], values["height"]
        found.put_size(*(int(first[1]), int(first[2])) if int(first[1]) * int(first[2]) else _first_pass(*second))
    else:
        match = next(filter(None, (SIZE.fullmatch(settings.get(name, "")) for name in SECOND_SIZES)), None)
        second = (int(match[1]), int(match[2])) if match else (0, 0)
    factor = values.get("hires")
    if factor is None and any(second) and values.get("width") and values.get("height"):
        factors = [side / own for side, own in zip(second, (values["width"], values["height"]), strict=True) if side]
        factor = max(factors)
        if factor - min(factors) > 0.01 * factor:
            found.notes.append(f"the second pass is not cropped to {second[0]}x{second[1]}")
    if factor is not None:
        runs_all = found.dialect.img2img is not run_share
        steps = values.pop("hires_steps", values.get("steps") if runs_all else None)
        found.put_second_pass(factor, values.pop("strength", None), steps)


def _first_pass(width: int, height: int) -> tuple[int, int]:
    """Size of a first pass that was left to the program (old_hires_fix_first_pass_dimensions)."""
    scale = math.sqrt(FIRST_PASS / (width * height))
    width, height = (math.ceil(scale * side / FIRST_MULTIPLE) * FIRST_MULTIPLE for side in (width, height))
    return width, height


def _put_noise(found: Settings, source: str | None) -> None:
    """PyTorch's noise where it was made on a CPU; a GPU's is not made here."""
    if found.dialect.cpu_noise or (source or "").casefold() == "cpu":
        found.put("rng", "torch")
    elif found.dialect is not SDJAX:
        found.notes.append(
            f"RNG {brief(source or 'GPU')} is not followed: the noise of its seeds is a GPU's, so images differ"
        )
