"""Files of prompts, one a line, each with its own settings after it: `a red heart --steps 20 --seed 3`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.core.errors import UserError, unknown
from sdjax.data.image_inputs import listed
from sdjax.pipeline.options import OPTIONS as TABLE
from sdjax.pipeline.options import Option, parse_value

OPTIONS = {name: option for name, option in TABLE.items() if option.scope == "image"} | {"prompt": Option("")}
# What kohya's sd-scripts and A1111's script "Prompts from file" call them.
OTHER_NAMES = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "guidance_scale",
    "s": "steps",
    "cfg_scale": "guidance_scale",
    "sampler_name": "sampler",
}
FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
MAX_BYTES = 2**24


class PromptLine(NamedTuple):
    """A prompt, None for a line of settings alone, and the settings that are its own."""

    prompt: str | None
    overrides: dict[str, Any]


def read_prompt_file(path: Path, place: str = "--from_file") -> list[PromptLine]:
    """Read the prompts of a UTF-8 file. Blank lines and lines that begin with # are skipped.

    A prompt is read as it stands up to the first ` --flag`. A flag's value goes on to the next flag or the line's end,
    may be quoted as in a shell, and may follow an equals sign; A1111's `--prompt "..."` in place of a bare prompt and
    kohya's one-letter flags are understood.

    Args:
        path: of at most 16 MiB.
        place: the flag that named the file.

    Raises:
        UserError: the file cannot be read or holds no prompt; or a line's flag or value is not known, which names the
            file, the line, the flag and the choices.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {place} {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"cannot read {place} {path}: it is larger than {MAX_BYTES} bytes")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {place} {path}: it is not UTF-8 text") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    prompts = [parse_line(line, f"{path} line {n}") for n, line in numbered if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{place} {path} holds no prompt: write one a line")
    return prompts


def parse_line(line: str, place: str) -> PromptLine:
    """Read a prompt and its settings; see `read_prompt_file`.

    Raises:
        UserError: an unknown flag, or a value that is missing or is none.
    """
    first = FLAG.search(line)
    prompt, rest = (line, "") if first is None else (line[: first.start()].strip(), line[first.start() :])
    overrides: dict[str, Any] = {}
    for flag, text in _flags(rest, place):
        name = flag.replace("-", "_")
        name = OTHER_NAMES.get(name, name)
        if name not in OPTIONS:
            raise unknown("flag", f"--{flag}", (f"--{option}" for option in OPTIONS), place)
        if text is None:
            raise UserError(f"--{flag} in {place} has no value")
        if name in overrides and not OPTIONS[name].many:
            raise UserError(f"--{flag} in {place} is there already")
        value = text if name == "prompt" else parse_value(name, text, f"{place}, --{flag}")
        overrides[name] = [*listed(overrides[name]), value] if name in overrides else value
    if "prompt" in overrides:
        if prompt:
            raise UserError(f"--prompt in {place}: the line begins with another prompt, {prompt[:40]!r}")
        prompt = str(overrides.pop("prompt"))
    return PromptLine(prompt or None, overrides)


def _flags(text: str, place: str) -> list[tuple[str, str | None]]:
    """Flags and their values, the words of each joined by blanks."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{place}: {error} after the prompt; a value with an apostrophe needs double quotes") from error
    flags: list[tuple[str, str | None]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name, value if equals else None))
        else:
            name, value = flags[-1]
            flags[-1] = (name, word if value is None else f"{value} {word}")
    return flags
