"""Images as files that say how they were made: A1111's `parameters` and an exact record in the PNG, a JSON beside it.

A1111's text is that of modules/processing.py (create_infotext) and modules/infotext_utils.py of
AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write, write_text
from sdjax.data.text.lora_tags import read_tags
from sdjax.diffusion.samplers.sections import SECTIONS
from sdjax.pipeline.options import OPTIONS

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
# ... and the noise schedules; the first three are diffusers' timestep spacings, which it does not know, nor the last,
# which are DeepFloyd IF's.
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
    **{name: name.capitalize() for name in SECTIONS},
}

# Its names of latents under a mask.
CONTENT_LABELS = {"image": "original", "noise": "latent noise", "nothing": "latent nothing"}

# Options that A1111's text gives a number: its names, by ours.
LABELS = {option.label: name for name, option in OPTIONS.items() if option.is_number and option.label}
RENAMED = {"first_index": "index"}


def parameters(record: Mapping[str, Any]) -> str:
    """A record, of which only the prompt must be there, as A1111 writes it: two prompts, then a line of settings."""
    get = record.get
    numbers = {label: get(RENAMED.get(name, name)) for label, name in LABELS.items()}
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
        "Masked content": CONTENT_LABELS.get(get("masked_content") or ""),
        # There 1 is none, and 2 leaves out one layer.
        "Clip skip": record["clip_skip"] + 1 if get("clip_skip") else None,
        "RNG": "CPU" if get("rng") == "torch" else None,
        "Lora hashes": ", ".join(f"{name}: {digits}" for name, *_, digits in get("loras") or () if digits) or None,
    }
    lines = [_tagged(record["prompt"], get("loras") or ())]
    if get("negative_prompt"):
        lines.append(f"{NEGATIVE} {record['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _tagged(prompt: str, loras: Sequence[Any]) -> str:
    """The prompt with a tag for each LoRA that it does not name."""
    named = {tag.name for tag in read_tags(prompt)[1]} if loras else {}
    tags = [f"<lora:{name}:{text:g}:{unet:g}>" for name, unet, text, _ in loras if name not in named]
    return " ".join([prompt, *tags])


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"], record: Mapping[str, Any]) -> None:
    """Write a PNG with the record inside, and the record as JSON; errors are those of `write_png`."""
    write_png(path, image, texts_of(record))
    write_record(path.with_suffix(".json"), record)


def texts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Text chunks of an image with this record."""
    return {"parameters": parameters(record), CHUNK: json.dumps(record)}


def write_png(path: Path, image: UInt8[np.ndarray, "h w 3"], texts: Mapping[str, str]) -> None:
    """Write a PNG with some text chunks; a UserError where the file exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists and is left as it is")
    with atomic_write(path) as partial:
        save_png(partial, image, texts)


def save_png(file: Path | BinaryIO, image: UInt8[np.ndarray, "h w 3"], texts: Mapping[str, str]) -> None:
    """Save an image with some text chunks as PNG."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; a UserError where it cannot be written."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _quoted(value: Any) -> str:
    """A value; as a JSON string where it would not end where it ends."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',\n:"') else text
