"""Settings that other programs leave in images: what they put in comes out in our names, and what cannot is named."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from foreign_settings import K_SAMPLERS, SAMPLERS, WRITERS, Texts, Wanted, Writer, wanted
from sd_parsers.parsers import AUTOMATIC1111Parser, ComfyUIParser, FooocusParser, InvokeAIParser, NovelAIParser

from sdjax.cli.records import parameters
from sdjax.cli.settings.read import find_settings

CASES = 200
OWN = Writer(lambda wish, _: {"parameters": parameters(wish)})
PEERS = {
    **dict.fromkeys(("A1111", "Forge", "SD.Next", "Fooocus as A1111"), AUTOMATIC1111Parser),
    **dict.fromkeys(("InvokeAI", "InvokeAI 2", "InvokeAI 1"), InvokeAIParser),
    **{"Fooocus": FooocusParser, "NovelAI": NovelAIParser, "ComfyUI": ComfyUIParser},
}
OURS = {label: name for name, labels in SAMPLERS.items() for label in labels if label}
OURS |= {label: name for name, label in K_SAMPLERS.items()}


def cases(name: str) -> Iterator[tuple[Wanted, Texts]]:
    rng = random.Random(name)
    for _ in range(CASES):
        wish = wanted(rng, WRITERS[name])
        yield wish, WRITERS[name].write(wish, rng)


@pytest.mark.parametrize("name", WRITERS)
def test_values_put_in_come_out(name: str):
    for wish, texts in cases(name):
        found = find_settings(texts, "x.png")
        assert not found.refused
        wish |= {"model": None} if name == "InvokeAI 1" else {}  # which names none
        assert {option: found.values.get(option) for option in wish} == wish, texts


def test_our_own_text_is_read_as_it_was_written():
    """Without the exact record, as other tools keep it; an image index tells it from A1111's."""
    rng = random.Random(0)
    for index in range(CASES):
        wish = {**wanted(rng, OWN), "index": index, "clip_skip": rng.randint(1, 4), "rng": "torch", "hires": 1.5}
        found = find_settings({"parameters": parameters(wish)}, "x.png")
        assert found.values == wish
        assert (found.penultimate["clip_skip"], found.notes) == (wish["clip_skip"], [])


@pytest.mark.parametrize("name", PEERS)
def test_sd_parsers_reads_the_same(name: str):
    """The PyPI package sd-parsers: prompts, sampler, steps, seed and guidance of every text that it reads."""
    read = 0
    for _, texts in cases(name):
        theirs = PEERS[name]().parse(texts)
        (sampler,) = theirs.samplers
        values = find_settings(texts, "x.png").values
        label = sampler.name.removesuffix(" Karras").removesuffix(" Exponential").removesuffix("_k")
        assert OURS[label] == values["sampler"]
        assert ", ".join(map(str, sampler.prompts)) == values["prompt"]
        assert ", ".join(map(str, sampler.negative_prompts)) == values["negative_prompt"]
        numbers = {**theirs.metadata, **sampler.parameters}
        for label, option in (("steps", "steps"), ("seed", "seed"), ("cfg_scale", "guidance_scale")):
            if label in numbers:  # a seed may be behind a link
                assert type(values[option])(numbers[label]) == values[option], texts
                read += 1
    assert read > 2 * CASES
