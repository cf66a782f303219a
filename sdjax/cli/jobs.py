"""Images that a command line asks for, and their rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.cli.prompt_files import PromptLine
from sdjax.core.errors import UserError
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import Row
from sdjax.pipeline.seeds import RANDOM, drawn_seed


class ImageJob(NamedTuple):
    """One image.

    Attributes:
        number: its place among all, which names its file.
        index: with the seed it decides the noise; the cells of a grid share it.
        prompt: None for models that take none.
        options: of the call, but for the prompt.
    """

    number: int
    index: int
    prompt: str | None
    options: Mapping[str, Any]


def expand_jobs(
    lines: Sequence[PromptLine], common: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], first_index: int
) -> list[ImageJob]:
    """All images, numbered by prompt, image and cell, in the order in which they are best made: cell by cell.

    Args:
        lines: prompts, whose own settings win over the common ones.
        common: settings; num_images says how many images each prompt has.
        cells: of a grid, whose settings win over all; one empty one without a grid.
        first_index: of the first image.
    """
    images = [line for line in lines for _ in range({**common, **line.overrides}.get("num_images") or 1)]
    jobs = []
    for cell, changed in enumerate(cells):
        for i, line in enumerate(images):
            options = {**common, **line.overrides, **changed}
            options.pop("num_images", None)
            jobs.append(ImageJob(first_index + i * len(cells) + cell, first_index + i, line.prompt, options))
    return jobs


def groups(jobs: Sequence[ImageJob]) -> Iterator[list[ImageJob]]:
    """Runs of jobs that one call can make: equal options but for the prompts, and indices without a gap."""
    for _, run in itertools.groupby(enumerate(jobs), lambda pair: (_shared(pair[1]), pair[1].index - pair[0])):
        yield [job for _, job in run]


def _shared(job: ImageJob) -> dict[str, Any]:
    return {name: value for name, value in job.options.items() if name != "negative_prompt"}


def suit_encoder(pipe: Pipeline, jobs: list[ImageJob], penultimate: Mapping[str, tuple[Any, Any]]) -> list[ImageJob]:
    """The jobs, with options that mean another thing for this model's text encoder replaced.

    Args:
        pipe, jobs: of which Stable Diffusion 1, alone with OpenAI's CLIP, keeps its jobs.
        penultimate: by option, a value for that, and the one that takes its place for others.
    """
    encoders = pipe.text.encoders
    if len(encoders) == 1 and encoders[0].config.activation == "quick_gelu":
        return jobs
    suited = []
    for job in jobs:
        changed = {name: other for name, (own, other) in penultimate.items() if job.options.get(name) == own}
        suited.append(job._replace(options={**job.options, **changed}))
    return suited


def prepare_jobs(pipe: Pipeline, jobs: Sequence[ImageJob]) -> list[Row]:
    """Rows of all jobs in their order; a UserError for whatever is wrong, before the first image is made.

    All that leave their seed to chance share the one that is drawn, and differ by their indices.
    """
    if any(job.options.get("seed") == RANDOM for job in jobs):
        seed = drawn_seed(RANDOM)
        jobs = [
            job._replace(options={**job.options, "seed": seed}) if job.options.get("seed") == RANDOM else job
            for job in jobs
        ]
    rows = []
    for group in groups(jobs):
        options: Any = {**_shared(group[0]), "first_index": group[0].index}
        if "prompt" not in pipe.inputs:
            if any(job.prompt for job in group):
                pipe.prepare([job.prompt or "" for job in group], **options)  # which refuses them
            rows += pipe.prepare(num_images=len(group), **options)
            continue
        if any(job.prompt is None for job in group):
            raise UserError(f"{pipe.name} needs a prompt; give one by --prompt, or before the flags of a line")
        negatives = [job.options.get("negative_prompt") for job in group]
        rows += pipe.prepare([str(job.prompt) for job in group], negatives, **options)
    return rows
