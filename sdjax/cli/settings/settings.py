"""Settings of an image: values in the names of options, and what else the text says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdjax.cli.settings.names import OWN_TIMESTEPS, Dialect, sampler_of, schedule_of
from sdjax.core.errors import UserError, unknown
from sdjax.pipeline.options import OPTIONS, Pair, Scales, check_value, parse_value
from sdjax.pipeline.seeds import RANDOM

# Options that have another name in the settings of one image.
OPTION_OF = {"index": "first_index"}
# Options that act only beside another.
NEEDS = {
    "strength": ("init_image", "an image to begin from"),
    "refiner_start": ("refiner", "a refiner"),
    "masked_content": ("mask", "a mask"),
    "hires_strength": ("hires", "a second pass"),
    "hires_steps": ("hires", "a second pass"),
}
# Every program here has an autoencoder of this factor, and cuts images to multiples of it.
FACTOR = 8
SHOWN = 80
MOST = 40
LONGEST = 2**16
UNSEEN = re.compile(r"hash|version|^user$", re.IGNORECASE)
COMMA = re.compile(r"(?<=\d),(?=\d)")


@dataclasses.dataclass
class Settings:
    """Settings of a text, and the rest of it.

    Attributes:
        place: of the text, for messages.
        dialect: names and habits of the program that wrote it.
        values: in the names of options, checked by their table; beside them `index` and `model`.
        refused: the error of each option whose value cannot be followed; another value takes its place.
        notes: a line each, of what is not followed.
        implied: options that only follow from the text's sampler, and mean nothing beside another.
        penultimate: values that take the place of others for models that condition on their text encoder's last layer
            but one (Stable Diffusion 2, SDXL).
    """

    place: str
    dialect: Dialect
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    refused: dict[str, UserError] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    implied: set[str] = dataclasses.field(default_factory=set)
    penultimate: dict[str, Any] = dataclasses.field(default_factory=dict)

    def put(self, name: str, value: Any, exact: bool = False) -> None:
        """Keep a value; None is none. Unless it must be exact, a number may be written as text."""
        if value is None:
            return
        try:
            self.values[name] = _checked(name, value, self.place, exact)
        except UserError as error:
            self.refused[name] = error

    def put_all(self, names: Mapping[str, str], text: Mapping[str, Any]) -> None:
        """Keep the values of a text under our names for its own."""
        for theirs, ours in names.items():
            self.put(ours, text.get(theirs))

    def put_prompts(self, prompt: Any, negative: Any) -> None:
        """Keep both prompts, in this program's syntax; none is an empty one."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative)):
            if isinstance(text, str) and len(text) > LONGEST:
                error = f"{name} in {self.place} has {len(text)} characters; at most {LONGEST} are read"
                self.refused[name] = UserError(error)
            else:
                self.put(name, self.dialect.translate(text) if isinstance(text, str) else text or "")

    def put_seed(self, seed: Any) -> None:
        """Keep a seed; one below 0 asked that program for any, and so does this one."""
        if re.fullmatch(r"-\d{1,20}", str(seed).strip()):
            self.notes.append(f"seed {seed} stands for a random one, which the text does not name")
            seed = RANDOM
        self.put("seed", seed)

    def put_size(self, width: Any, height: Any) -> None:
        """Keep a size in pixels, cut to what that program makes of it."""
        for name, side in (("width", width), ("height", height)):
            self.put(name, side)
            cut = self.values.get(name, 0) % FACTOR
            if cut and self.values[name] > FACTOR:
                self.values[name] -= cut
                self.notes.append(f"{name} {side} made an image of {self.values[name]} pixels")

    def put_sampler(self, label: Any, schedule: Any = None) -> None:
        """Keep a sampler and its schedule."""
        label, schedule = ("" if text is None else str(text).strip() for text in (label, schedule))
        if not label and not schedule:
            return
        sampler = None
        try:
            if label:
                sampler, schedule = sampler_of(self.dialect, label, schedule, self.place)
                self.put("sampler", sampler)
        except UserError as error:
            self.refused["sampler"] = error
        try:
            chosen, implied = schedule_of(self.dialect, sampler, schedule, self.place)
        except UserError as error:
            self.refused["schedule"] = error
            return
        if sampler in OWN_TIMESTEPS:
            if chosen is not None and not implied:
                self.notes.append(f"schedule {schedule} is not followed: {sampler} has the timesteps of its training")
            return
        self.put("schedule", chosen)
        if implied:
            self.implied.add("schedule")

    def put_second_pass(self, factor: Any, strength: Any, steps: Any = None) -> None:
        """Keep a second pass over the enlarged image; steps are None where that program runs a share of all."""
        self.put("hires", factor)
        self.put("hires_strength", strength)
        if self.values.get("hires_strength"):  # at 0 all would be a share of nothing
            self.put("hires_steps", steps)

    def put_clip_skip(self, layer: Any) -> None:
        """Keep the layers that are skipped, of which that program names the one it stops at."""
        self.put("clip_skip", layer)
        stop = self.values.pop("clip_skip", None)
        if stop is not None:
            first, other = self.dialect.clip_skip
            self.values["clip_skip"] = max(0, stop - first)
            self.penultimate["clip_skip"] = 0 if other is None else max(0, stop - other)

    def note_others(self, text: Mapping[str, Any]) -> None:
        """Note values that have no part in an image here, unless they are none; hashes and the like come last."""
        if others := [(name, value) for name, value in text.items() if value and value != "None"]:
            others.sort(key=lambda pair: bool(UNSEEN.search(pair[0])))
            listed = ", ".join(f"{brief(name)}: {brief(value)}" for name, value in others[:MOST])
            self.notes.append(f"not followed: {listed}" + ", ..." * (len(others) > MOST))

    def drop(self, given: Iterable[str]) -> None:
        """Let options that are given by the user win over the text, and drop values that nothing acts on.

        Raises:
            UserError: a value that is not given, and cannot be followed.
        """
        given = set(given)
        for name, error in self.refused.items():
            if not given & {name, OPTION_OF.get(name, name)}:
                raise error
        for name in self.implied if "sampler" in given else ():
            self.values.pop(name, None)
        if "init_image" in given and not given & {"steps", "strength"} and {"steps", "strength"} <= self.values.keys():
            steps, strength = self.dialect.img2img(self.values["steps"], self.values["strength"])
            self.values |= {"steps": steps, "strength": strength}
        if "init_image" in given - self.values.keys() and "hires" not in given and self.values.pop("hires", None):
            self.notes.append("the second pass is not followed: init_image takes the place of the first")
        for name, (needed, noun) in NEEDS.items():
            if self.values.get(name) is not None and needed not in given and self.values.get(needed) is None:
                self.notes.append(f"{name} {self.values.pop(name)} acts on {noun}, which the text does not name")


def brief(value: Any) -> str:
    """A value as printable text of at most a line."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "..."
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * SHOWN]).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _checked(name: str, value: Any, place: str, exact: bool) -> Any:
    """A value of an option, a model's name or a prompt; a short UserError where it is of another type or range."""
    row = OPTION_OF.get(name, name)
    option = OPTIONS.get(row)
    if option is None or not (option.is_number or option.kind in (Pair, Scales)):
        if not isinstance(value, str):
            raise UserError(f"{name} {brief(value)!r} in {place} is not a text")
        if option is not None and option.choices and value not in option.choices:
            raise unknown(name, brief(value), option.choices, place)
        return value
    if len(brief(value)) > SHOWN:
        raise UserError(f"{name} {brief(value)!r} in {place}: it must be a number")
    if isinstance(value, str) and not exact:
        return parse_value(row, COMMA.sub(".", value) if option.kind is float else value, place)
    if isinstance(value, float) and option.kind is int and value.is_integer() and not exact:
        value = int(value)
    return check_value(row, value, place)
