"""Prompts that change from step to step, or that AND composes: texts to encode, and which of them each row takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.text.prompt_editing import Pass, composed, texts_by_step
from sdjax.diffusion.samplers import SamplerTable
from sdjax.diffusion_model.sampling import ConditionSchedule

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline

MOST_COMPOSED, MOST_TEXTS = 16, 64


def needs_null(pipe: Pipeline, prompt: str) -> bool:
    """True if AND composes a prompt, with the null condition at any guidance scale; a UserError if the model can't."""
    composes = len(composed(prompt)) > 1
    if composes and pipe.is_distilled:
        raise UserError(f"{pipe.name} was distilled to do without the null condition, with which AND composes prompts")
    return composes


def edit_prompts(
    inputs: Mapping[str, Any], table: SamplerTable, over: Pass, first: int, guided: bool
) -> tuple[dict[str, Any], ConditionSchedule | None]:
    """Inputs whose prompts are lists of the texts that the rows of a table take, and the schedule of their conditions.

    All network calls of a step take the same text. A prompt that does not change stays one text, without a schedule.

    Args:
        inputs: of one image, with `prompt` and `negative_prompt`.
        table, first: the sampler's, and the step that counts as the first.
        over: see `Pass`.
        guided: whether the negative prompt takes part.

    Raises:
        UserError: more texts than `MOST_TEXTS`, or more prompts than `MOST_COMPOSED` in one.
    """
    parts = composed(inputs["prompt"])
    if len(parts) > MOST_COMPOSED:
        raise UserError(f"AND composes {len(parts)} prompts in {inputs['prompt'][:40]!r}; at most {MOST_COMPOSED}")
    negative = inputs["negative_prompt"]
    texts = [texts_by_step(text, over) for text, _ in parts]
    against = texts_by_step(negative, over) if negative and guided else [negative] * over.steps
    assert table.step is not None, "the host's own"
    steps = table.step[table.active] - first
    prompts, negatives = _places(each[step] for step in steps for each in texts), _places(against[i] for i in steps)
    count = max(len(prompts), len(negatives))
    if count > MOST_TEXTS:
        raise UserError(f"the prompt {inputs['prompt'][:40]!r} has {count} texts; at most {MOST_TEXTS} fit")
    if count == len(parts) == 1:
        return {**inputs, "prompt": next(iter(prompts)), "negative_prompt": next(iter(negatives))}, None
    # Each text is encoded with its null condition beside it, where there is guidance; a power of two compiles seldom.
    rows = 2 if guided else 1
    places = np.zeros((len(table.active), len(parts) + rows - 1), np.int32)
    for call, step in enumerate(steps):
        null = [2 * negatives[against[step]] + 1] if guided else []
        places[call] = [rows * prompts[each[step]] for each in texts] + null
    weights = np.array([weight for _, weight in parts], np.float32)
    padded = {"prompt": _padded(prompts, count), "negative_prompt": _padded(negatives, count)}
    return {**inputs, **padded}, ConditionSchedule(places, weights)


def _places(texts: Any) -> dict[Any, int]:
    """Distinct texts, each with its place among them."""
    return {text: place for place, text in enumerate(dict.fromkeys(texts))}


def _padded(texts: Mapping[Any, int], count: int) -> list[Any]:
    """Texts as many as the power of two that holds `count`; the first one fills up."""
    size = 2 ** max(count - 1, 1).bit_length()
    return [*texts, *[next(iter(texts))] * (size - len(texts))]
