"""Weights of words in other programs' prompts, in A1111's syntax; and what only some texts of those programs hold."""

from __future__ import annotations

import json
import random

import pytest
from foreign_settings import WRITERS, wanted

from sdjax.cli.settings.read import find_settings
from sdjax.data.text.prompts import parse
from sdjax.data.text.wildcards import fill_template


def weights(prompt: str) -> list[tuple[str, float]]:
    """Words of a prompt, and their weights, as our parser reads them."""
    sections = parse(prompt).sections
    return [(span.text.strip(), round(span.weight, 2)) for section in sections for span in section if span.text.strip()]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a {cat} b", [("a", 1.0), ("cat", 1.05), ("b", 1.0)]),
        ("{{cat}} [dog]", [("cat", 1.1), ("dog", 0.95)]),
        ("a (cat:3) b", [("a (cat:3) b", 1.0)]),
        ("1.5::big cat::, a", [("big cat", 1.5), (", a", 1.0)]),
    ],
)
def test_novelais_braces(prompt: str, wanted: list[tuple[str, float]]):
    texts = {"Description": prompt, "Comment": json.dumps({"steps": 4, "sampler": "k_euler", "uc": prompt})}
    values = find_settings(texts, "x.png").values
    assert weights(values["prompt"]) == weights(values["negative_prompt"]) == wanted


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a cat++ b", [("a", 1.0), ("cat", 1.21), ("b", 1.0)]),
        ("noisy-- high-quality", [("noisy", 0.81), ("high-quality", 1.0)]),
        ("(red hat)1.3, (big)+ (c)", [("red hat", 1.3), (",", 1.0), ("big", 1.1), ("c", 1.0)]),
        ("[a] (b\\))-", [("[a]", 1.0), ("b)", 0.9)]),
    ],
)
def test_invokeais_marks(prompt: str, wanted: list[tuple[str, float]]):
    texts = {"invokeai_metadata": json.dumps({"positive_prompt": prompt, "steps": 4, "scheduler": "euler"})}
    assert weights(find_settings(texts, "x.png").values["prompt"]) == wanted


@pytest.mark.parametrize("prompt", ["a {red|blue} cat", "{2$$a|b} {c} \\{d|e}", "{{x|y}}"])
@pytest.mark.parametrize("name", ["A1111", "ComfyUI", "InvokeAI", "Fooocus"])
def test_braces_of_other_programs_draw_nothing(name: str, prompt: str):
    """They are left of prompts whose words have been drawn; A1111 drops backslashes."""
    rng = random.Random(0)
    wish = {**wanted(rng, WRITERS[name]), "prompt": prompt}
    prompt = find_settings(WRITERS[name].write(wish, rng), "x.png").values["prompt"]
    assert fill_template(prompt, None, "0") == prompt
    assert weights(prompt) == [(wish["prompt"].replace("\\", ""), 1.0)]


def test_blends_of_invokeai_are_named():
    texts = {"invokeai_metadata": json.dumps({"positive_prompt": '("a", "b").blend(1, 1)', "scheduler": "euler_k"})}
    found = find_settings(texts, "x.png")
    assert any(note.startswith("blends and conjunctions") for note in found.notes)
    assert (found.values["sampler"], found.values["schedule"]) == ("euler", "karras")


def test_invokeais_devices_adapters_and_strengths():
    content = {
        "positive_prompt": "x",
        "scheduler": "dpmpp_2m_sde_k",
        "rand_device": "cuda",
        "strength": 0.6,
        "steps": 30,
    }
    content |= {"loras": [{"model": {"name": "thing"}, "weight": 0.7}], "controlnets": [], "clip_skip": 1}
    found = find_settings({"invokeai_metadata": json.dumps(content)}, "x.png")
    assert "rng" not in found.values
    assert any(note.startswith("rand_device cuda") for note in found.notes)
    assert any("thing" in note for note in found.notes)
    assert (found.values["clip_skip"], found.penultimate["clip_skip"]) == (1, 0), "SDXL names it and does not use it"
    found.drop({"init_image"})
    assert (found.values["steps"], found.values["strength"]) == (30, 0.6), "as diffusers"


def test_novelais_characters_and_schedules():
    def caption(*texts: str) -> dict:
        return {"caption": {"base_caption": texts[0], "char_captions": [{"char_caption": text} for text in texts[1:]]}}

    content = {
        "steps": 28,
        "sampler": "k_dpmpp_2m",
        "noise_schedule": "polyexponential",
        "cfg_rescale": 0.2,
        "sm": True,
    }
    content |= {"v4_prompt": caption("a room", "a girl", "a boy"), "v4_negative_prompt": caption("bad", "", "hat")}
    found = find_settings({"Description": "other", "Comment": json.dumps(content)}, "x.png")
    assert (found.values["prompt"], found.values["negative_prompt"]) == ("a room, a girl, a boy", "bad, hat")
    assert (found.values["schedule"], found.values["guidance_rescale"]) == ("exponential", 0.2)
    assert "not followed: sm: true" in found.notes


def test_fooocus_encodes_its_full_prompts():
    content = {
        "prompt": "cat",
        "full_prompt": ["cinematic cat", "sharp"],
        "base_model": "m",
        "sampler": "dpmpp_2m_sde_gpu",
    }
    content |= {
        "negative_prompt": "",
        "full_negative_prompt": ["ugly"],
        "scheduler": "karras",
        "clip_skip": 2,
        "steps": 30,
    }
    found = find_settings({"parameters": json.dumps(content)}, "x.png")
    assert (found.values["prompt"], found.values["negative_prompt"]) == ("cinematic cat, sharp", "ugly")
    assert (found.values["sampler"], found.values["schedule"]) == ("dpmpp_2m_sde", "karras")
    assert found.penultimate == {"clip_skip": 0}, "SDXL's own layer"


def test_few_step_samplers_have_timesteps_of_their_own():
    content = {"prompt": "cat", "base_model": "m", "sampler": "lcm", "scheduler": "lcm", "steps": 8}
    found = find_settings({"parameters": json.dumps(content)}, "x.png")
    assert (found.values["sampler"], found.values.get("schedule"), found.refused) == ("lcm", None, {})
    assert not any(note.startswith("schedule") for note in found.notes)
    found = find_settings({"parameters": json.dumps(content | {"scheduler": "sgm_uniform"})}, "x.png")
    assert "schedule" not in found.values
    assert "schedule sgm_uniform is not followed: lcm has the timesteps of its training" in found.notes
