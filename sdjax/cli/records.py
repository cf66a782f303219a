"""Images as files that say how they were made: A1111's `parameters` and an exact record in the PNG, a JSON beside it.

A1111's text is that of modules/processing.py (create_infotext) and modules/infotext_utils.py of
AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.core.errors import UserError, unknown
from sdjax.core.files import atomic_write, write_text
from sdjax.data.images import UNREADABLE
from sdjax.pipeline.options import LOAD_OPTIONS, OPTIONS, Option, Pair

# The text chunk that holds the record as JSON, word for word.
CHUNK = "sdjax"
NEGATIVE = "Negative prompt:"

# What A1111's web UI and its forks, and with them every tool that reads their text, call the samplers ...
SAMPLER_LABELS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lcm": "LCM",
    "tcd": "TCD",
}
# ... and the noise schedules; the first three are diffusers' timestep spacings, which it does not know.
SCHEDULE_LABELS = {
    "leading": "Leading",
    "linspace": "Linspace",
    "trailing": "Trailing",
    "karras": "Karras",
    "exponential": "Exponential",
    "lu": "Lu",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ays": "Align Your Steps",
    "ays_sdxl": "Align Your Steps XL",
    "kl_optimal": "KL Optimal",
}
# Its other names for evenly spaced timesteps, and what it takes where the schedule is "Automatic".
UNIFORM = ("uniform", "normal")
AUTOMATIC = {
    **dict.fromkeys(("dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2s_a", "dpmpp_sde"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
}

# A name, which may hold blanks and hyphens, and a value up to a comma, or a JSON string.
SETTING = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"(?=\s*(?:,|$))|[^,]*)')
SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
# A1111's own least number of settings for a last line to be one of settings.
FEWEST_SETTINGS = 3

# Options that A1111's text gives a number: its names, by ours.
LABELS = {option.label: name for name, option in OPTIONS.items() if option.is_number and option.label}
LABELS |= {"Eta DDIM": "eta"}
RENAMED = {"first_index": "index"}
FOLLOWED = {*LABELS, "Sampler", "Schedule type", "Size", "Model", "Clip skip", "RNG", "Version"}
SOURCES = ("prompt", "model", "checkpoint", *LOAD_OPTIONS)

logger = logging.getLogger("sdjax")


def parameters(record: Mapping[str, Any]) -> str:
    """A record, of which only the prompt must be there, as A1111 writes it: two prompts, then a line of settings."""
    get = record.get
    numbers = {label: get(RENAMED.get(name, name)) for label, name in LABELS.items() if label != "Eta DDIM"}
    numbers["CFG Rescale"] = get("guidance_rescale") or None  # none is not said
    numbers = {label: f"{value:g}" if isinstance(value, float) else value for label, value in numbers.items()}
    # A second pass has A1111's strength for itself. Its digits are all kept: they decide the number of steps.
    numbers["Denoising strength"] = get("hires_strength") if get("hires") else get("strength")
    settings = {
        "Steps": numbers.pop("Steps"),
        "Sampler": SAMPLER_LABELS.get(get("sampler", ""), get("sampler")),
        "Schedule type": SCHEDULE_LABELS.get(get("schedule") or "", get("schedule")),
        **numbers,
        "Size": f"{record['width']}x{record['height']}" if "width" in record and "height" in record else None,
        "Model": get("model"),
        "Hires upscaler": "Lanczos" if get("hires") else None,
        # There 1 is none, and 2 leaves out one layer.
        "Clip skip": record["clip_skip"] + 1 if get("clip_skip") else None,
        "RNG": "CPU" if get("rng") == "torch" else None,
    }
    lines = [record["prompt"]]
    if get("negative_prompt"):
        lines.append(f"{NEGATIVE} {record['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Settings stored in a PNG: the exact record of an image of ours, else A1111's text in our names.

    Every value comes from the file and is as trustworthy as it: numbers may be out of range, a checkpoint or a given
    image may be any path. The image itself is not decoded.

    Args:
        path: a PNG; its text chunks may hold a megabyte each (Pillow's limit).

    Returns:
        Of an image of ours, the record that was written. Else prompt, negative_prompt and whatever is there of steps,
        sampler, schedule, guidance_scale, guidance_rescale, eta, seed, index, width, height, model, strength, clip_skip
        (layers left out, one less than there) and rng ("torch" for CPU).

    Raises:
        UserError: the file cannot be read, says nothing, or says something of another type than it must have; or its
            sampler or schedule is not known here.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            texts = {name: str(image.info[name]) for name in (CHUNK, "parameters") if name in image.info}
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no PNG, or a damaged one"
        raise UserError(f"cannot read the settings of {path}: {reason}") from error
    if CHUNK in texts:
        return _checked(_parsed_json(texts[CHUNK], path), path)
    if "parameters" in texts:
        return _checked(parse_parameters(texts["parameters"], str(path)), path)
    raise UserError(f"{path} does not say how it was made: it has neither a {CHUNK} nor a parameters text")


def parse_parameters(text: str, place: str) -> dict[str, Any]:
    """A1111's text in our names; see `read_parameters`. Settings that have none here are logged.

    Args:
        text: the prompt, "Negative prompt:" and it, and a line of settings, each of which may be missing.

    Raises:
        UserError: a number is none, or a sampler or schedule is not known.
    """
    *lines, last = text.strip().split("\n")
    settings = _settings(last)
    if len(settings) < FEWEST_SETTINGS:
        lines, settings = [*lines, last], {}
    prompt, negative = _prompts(lines)
    record: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    for label, name in LABELS.items():
        if label in settings:
            record[RENAMED.get(name, name)] = _number(OPTIONS[name].kind, settings[label], label, place)
    if size := SIZE.fullmatch(settings.get("Size", "")):
        record["width"], record["height"] = int(size[1]), int(size[2])
    if "Model" in settings:
        record["model"] = settings["Model"]
    if "Clip skip" in settings:
        record["clip_skip"] = max(0, _number(int, settings["Clip skip"], "Clip skip", place) - 1)
    if settings.get("RNG") == "CPU":
        record["rng"] = "torch"
    if "Sampler" in settings:
        record["sampler"], schedule = _sampler(settings["Sampler"], settings.get("Schedule type"), place)
        record |= {} if schedule is None else {"schedule": schedule}
    if "Hires upscale" in settings and "strength" in record:  # it is then that of the second pass
        record["hires_strength"] = record.pop("strength")
    if left := [f"{name}: {value}" for name, value in settings.items() if name not in FOLLOWED]:
        logger.warning("%s: not followed: %.200s", place, ", ".join(left))
    return record


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"], record: Mapping[str, Any]) -> None:
    """Write a PNG with the record inside, and the record as JSON; errors are those of `write_png`."""
    write_png(path, image, {"parameters": parameters(record), CHUNK: json.dumps(record)})
    write_record(path.with_suffix(".json"), record)


def write_png(path: Path, image: UInt8[np.ndarray, "h w 3"], texts: Mapping[str, str]) -> None:
    """Write a PNG with some text chunks; a UserError where the file exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists and is left as it is")
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    with atomic_write(path) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=chunks)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; a UserError where it cannot be written."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _quoted(value: Any) -> str:
    """A value; as a JSON string where it would not end where it ends."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',\n:"') else text


def _settings(line: str) -> dict[str, str]:
    """The settings of a line; pieces between commas that are none are left out."""
    found, at = {}, 0
    while at < len(line):
        match = SETTING.match(line, at)
        if match:
            name, value = match.groups()
            found[name] = _unquoted(value.strip())
        comma = line.find(",", match.end() if match else at)
        at = len(line) if comma < 0 else comma + 1
    return found


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
    lines = [line.strip() for line in lines]
    first = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[first:]).removeprefix(NEGATIVE).strip()
    return "\n".join(lines[:first]), negative


def _sampler(label: str, schedule: str | None, place: str) -> tuple[str, str | None]:
    """Our names; until 2024 A1111 wrote the schedule as the end of the sampler's name."""
    samplers = {text.casefold(): name for name, text in SAMPLER_LABELS.items()}
    samplers |= {name: name for name in SAMPLER_LABELS}
    schedules = {text.casefold(): name for name, text in SCHEDULE_LABELS.items()} | dict.fromkeys(UNIFORM, "linspace")
    schedules |= {name: name for name in SCHEDULE_LABELS}
    name = label.casefold()
    if name not in samplers:
        ending = next((text for text in schedules if name.endswith(f" {text}")), "")
        name, schedule = name.removesuffix(f" {ending}"), schedule or ending
    if name not in samplers:
        raise unknown("sampler", label[:80], SAMPLER_LABELS, place)
    name = samplers[name]
    if schedule is None:
        return name, None
    if schedule.casefold() == "automatic":
        return name, AUTOMATIC.get(name)
    if schedule.casefold() not in schedules:
        raise unknown("schedule", schedule[:80], SCHEDULE_LABELS, place)
    return name, schedules[schedule.casefold()]


def _number(kind: type[int] | type[float], text: str, name: str, place: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} {text[:80]!r} in {place} is not {'an integer' if kind is int else 'a number'}")
    return number


def _parsed_json(text: str, path: str | Path) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    try:
        record = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {CHUNK} text of {path} is damaged: it is not JSON") from error
    if not isinstance(record, dict) or "prompt" not in record:
        raise UserError(f"the {CHUNK} text of {path} is damaged: it is no record of an image")
    # As version 0.1 called them.
    return {"embeddings" if name == "embedding" else name: value for name, value in record.items()}


def _checked(record: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A record whose values have the types of their options; ranges are the checkpoint's affair."""
    for name, value in record.items():
        option = OPTIONS.get("first_index" if name == "index" else name)
        wanted = _types(name, option)
        if value is None or not wanted:
            continue
        if not isinstance(value, wanted) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise UserError(f"{name} {str(value)[:80]!r} in {path} is not of type {names}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} {value!r} in {path} is not a number")
    for kind, labels in (("sampler", SAMPLER_LABELS), ("schedule", SCHEDULE_LABELS)):
        if record.get(kind) is not None and record[kind] not in labels:
            raise unknown(kind, record[kind][:80], labels, str(path))
    return record


def _types(name: str, option: Option | None) -> tuple[type, ...]:
    """Types that JSON may have for a field; () for any."""
    if name in SOURCES:
        return (list,) if name == "embeddings" else (str,)
    if option is None or name in ("layout", "class_label"):
        return ()
    if option.kind is Pair:
        return (list,)
    return {int: (int,), float: (int, float)}.get(option.kind, (str,))
