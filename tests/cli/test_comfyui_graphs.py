"""ComfyUI's graphs beyond the default one: links through nodes, samplers of parts, second passes, the editor's form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdjax.cli.settings.read import find_settings
from sdjax.cli.settings.settings import Settings
from sdjax.core.errors import UserError

Graph = dict[str, tuple[str, dict[str, Any]]]
SAMPLER = {"seed": 5, "steps": 20, "cfg": 7.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
LINKS = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
DEFAULT: Graph = {
    "3": ("KSampler", SAMPLER | LINKS),
    "4": ("CheckpointLoaderSimple", {"ckpt_name": "a/v1-5.safetensors"}),
    "5": ("EmptyLatentImage", {"width": 512, "height": 768, "batch_size": 1}),
    "6": ("CLIPTextEncode", {"text": "red heart", "clip": ["4", 1]}),
    "7": ("CLIPTextEncode", {"text": "blurry", "clip": ["4", 1]}),
    "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
    "9": ("SaveImage", {"images": ["8", 0]}),
}
VALUES = {
    **{"prompt": "red heart", "negative_prompt": "blurry", "seed": 5, "steps": 20, "guidance_scale": 7.5},
    **{"sampler": "dpmpp_2m", "schedule": "karras", "width": 512, "height": 768, "model": "v1-5", "rng": "torch"},
}


def read(graph: Graph, *given: str) -> Settings:
    nodes = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
    nodes["3"]["is_changed"] = [float("nan")]  # as it writes, which is no JSON
    found = find_settings({"prompt": json.dumps(nodes)}, "x.png")
    found.drop(given)
    return found


def changed(**inputs: Any) -> Graph:
    return {**DEFAULT, "3": ("KSampler", DEFAULT["3"][1] | inputs)}


def test_the_default_graph():
    found = read(DEFAULT)
    assert found.values == VALUES
    assert not found.notes


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("PrimitiveInt", {"value": 5}),
        ("Seed (rgthree)", {"seed": 5}),
        ("CR Seed", {"seed": 5}),
        ("INTConstant", {"value": 5}),
        ("Reroute", {"": ["21", 0]}),
    ],
)
def test_numbers_behind_links(kind: str, inputs: dict[str, Any]):
    graph = {**changed(seed=["20", 0]), "20": (kind, inputs), "21": ("PrimitiveInt", {"value": 5})}
    assert read(graph).values == VALUES


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ({"20": ("String Literal", {"string": "a dog"})}, "a dog"),
        ({"20": ("ShowText|pysssss", {"text": ["21", 0]}), "21": ("Text Multiline", {"text": "a dog"})}, "a dog"),
        ({"20": ("StringConcatenate", {"string_a": "a", "string_b": ["21", 0], "delimiter": " "})}, "a dog"),
    ],
)
def test_prompts_behind_links(nodes: Graph, text: str):
    graph = {**DEFAULT, "21": ("PrimitiveString", {"value": "dog"}), **nodes}
    graph["6"] = ("CLIPTextEncode", {"text": ["20", 0], "clip": ["4", 1]})
    assert read(graph).values["prompt"] == text


def test_conditions_that_pass_both_prompts_on():
    control = {
        "positive": ["6", 0],
        "negative": ["7", 0],
        "control_net": ["31", 0],
        "image": ["32", 0],
        "strength": 1.0,
    }
    graph = {
        **changed(positive=["30", 0], negative=["30", 1]),
        "30": ("ControlNetApplyAdvanced", control),
        "31": ("ControlNetLoader", {"control_net_name": "canny.safetensors"}),
        "32": ("LoadImage", {"image": "pose.png"}),
    }
    found = read(graph)
    assert found.values == VALUES
    (note,) = found.notes
    assert "ControlNetApplyAdvanced 30" in note
    assert "ControlNetLoader 31: canny.safetensors" in note


def test_models_through_loras_which_are_named():
    lora = {"model": ["4", 0], "clip": ["4", 1], "lora_name": "thing.safetensors", "strength_model": 0.8}
    found = read({**changed(model=["10", 0]), "10": ("LoraLoader", lora)})
    assert found.values == VALUES
    assert found.notes == ["not followed: LoraLoader 10: thing.safetensors"]


@pytest.mark.parametrize(("stop", "first", "other"), [(-1, 0, 0), (-2, 1, 0), (-3, 2, 1)])
def test_clip_skip_is_counted_from_the_output(stop: int, first: int, other: int):
    graph = {**DEFAULT, "12": ("CLIPSetLastLayer", {"stop_at_clip_layer": stop, "clip": ["4", 1]})}
    graph["6"] = ("CLIPTextEncode", {"text": "red heart", "clip": ["12", 0]})
    found = read(graph)
    assert (found.values["clip_skip"], found.penultimate["clip_skip"]) == (first, other)


def test_brackets_and_commands_of_a1111_are_words():
    graph = {**DEFAULT, "6": ("CLIPTextEncode", {"text": "[red] (heart:1.2) \\[x AND BREAK", "clip": ["4", 1]})}
    assert read(graph).values["prompt"] == "\\[red\\] (heart:1.2) \\[x and break"


def test_samplers_of_parts():
    parts = {"noise": ["40", 0], "guider": ["41", 0], "sampler": ["42", 0], "sigmas": ["43", 0]}
    graph = {
        **DEFAULT,
        "3": ("SamplerCustomAdvanced", {**parts, "latent_image": ["5", 0]}),
        "40": ("RandomNoise", {"noise_seed": 5}),
        "41": ("CFGGuider", {"cfg": 7.5, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}),
        "42": ("KSamplerSelect", {"sampler_name": "dpmpp_2m"}),
        "43": ("BasicScheduler", {"scheduler": "karras", "steps": 20, "denoise": 1.0, "model": ["4", 0]}),
    }
    assert read(graph).values == VALUES
    graph["43"] = ("KarrasScheduler", {"steps": 20, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 7.0})
    assert read(graph).values == VALUES
    graph["41"] = ("BasicGuider", {"model": ["4", 0], "conditioning": ["6", 0]})
    assert read(graph).values == VALUES | {"guidance_scale": 1.0, "negative_prompt": ""}
    custom = {"add_noise": True, "noise_seed": 5, "cfg": 7.5, "sampler": ["42", 0], "sigmas": ["43", 0]}
    graph["3"] = ("SamplerCustom", custom | LINKS)
    assert read(graph).values == VALUES


def advanced(start: int, end: int, add_noise: str, latent: str, model: str = "4") -> tuple[str, dict[str, Any]]:
    own = {"add_noise": add_noise, "noise_seed": 5, "start_at_step": start, "end_at_step": end}
    rest = {name: value for name, value in SAMPLER.items() if name not in ("seed", "denoise")}
    return "KSamplerAdvanced", own | rest | LINKS | {"latent_image": [latent, 0], "model": [model, 0]}


def test_loaders_that_hold_everything():
    """The nodes of jags111/efficiency-nodes-comfyui, and one that works on the image afterwards."""
    loader = {"ckpt_name": "v1-5.ckpt", "positive": "red heart", "negative": "blurry", "batch_size": 1}
    loader |= {"empty_latent_width": 512, "empty_latent_height": 768}
    links = {"model": ["20", 0], "positive": ["20", 1], "negative": ["20", 2], "latent_image": ["20", 3]}
    face = {**SAMPLER, "seed": 99, "steps": 4, "image": ["3", 5], "positive": ["20", 1], "negative": ["20", 2]}
    graph = {
        "3": ("KSampler (Efficient)", SAMPLER | links),
        "20": ("Efficient Loader", loader),
        "21": ("FaceDetailer", face),
        "9": ("SaveImage", {"images": ["21", 0]}),
    }
    assert read(graph).values == VALUES
    assert read({**graph, "9": ("SaveImage", {"images": ["3", 5]})}).values == VALUES


def test_a_refiner_takes_over():
    graph = {
        **DEFAULT,
        "3": advanced(16, 10000, "disable", "30", "31"),
        "30": advanced(0, 16, "enable", "5"),
        "31": ("CheckpointLoaderSimple", {"ckpt_name": "refiner.safetensors"}),
    }
    assert read(graph, "refiner").values == VALUES | {"refiner_start": 0.8}
    found = read(graph)
    assert found.values == VALUES
    assert "refiner_start 0.8 acts on a refiner, which the text does not name" in found.notes


@pytest.mark.parametrize(
    ("between", "factor"),
    [
        ({"50": ("LatentUpscaleBy", {"samples": ["30", 0], "upscale_method": "bilinear", "scale_by": 1.5})}, 1.5),
        ({"50": ("LatentUpscale", {"samples": ["30", 0], "width": 1024, "height": 1536, "crop": "disabled"})}, 2.0),
        (
            {
                "50": ("VAEEncode", {"pixels": ["51", 0], "vae": ["4", 2]}),
                "51": ("ImageScaleBy", {"image": ["52", 0], "scale_by": 1.5}),
                "52": ("VAEDecode", {"samples": ["30", 0], "vae": ["4", 2]}),
            },
            1.5,
        ),
    ],
)
def test_second_passes(between: Graph, factor: float):
    graph = {**changed(denoise=0.5, latent_image=["50", 0], steps=12), "30": DEFAULT["3"], **between}
    found = read(graph)
    assert found.values == VALUES | {"hires": factor, "hires_strength": 0.5, "hires_steps": 12}
    assert not found.notes


def test_images_to_begin_from_are_named():
    graph = {**changed(denoise=0.6, latent_image=["60", 0])}
    graph["60"] = ("VAEEncode", {"pixels": ["61", 0], "vae": ["4", 2]})
    graph["61"] = ("LoadImage", {"image": "cat.png"})
    found = read(graph)
    assert "strength" not in found.values
    assert "not followed: LoadImage 61: cat.png" in found.notes
    assert read(graph, "init_image").values["steps"] == 33, "all 20 of a schedule of int(20 / 0.6)"


def test_unknown_samplers_and_missing_prompts_are_refused_unless_given():
    with pytest.raises(UserError, match=r"unknown sampler 'res_multistep' in x\.png"):
        read(changed(sampler_name="res_multistep"))
    assert "sampler" not in read(changed(sampler_name="res_multistep"), "sampler").values
    bare = {"3": ("KSampler", SAMPLER)}
    with pytest.raises(UserError, match=r"ComfyUI's graph in x\.png leads to no prompt; give one by --prompt"):
        read(bare)
    assert read(bare, "prompt").values["steps"] == 20


def test_the_editors_form_alone():
    def node(key: int, kind: str, widgets: list[Any], inputs: dict[str, int], mode: int = 0) -> dict[str, Any]:
        slots = [{"name": name, "link": link} for name, link in inputs.items()]
        return {"id": key, "type": kind, "mode": mode, "widgets_values": widgets, "inputs": slots}

    conditions = {"model": 1, "positive": 2, "negative": 3, "latent_image": 4, "seed": 8}
    nodes = [
        node(3, "KSampler", [0, "randomize", 20, 7.5, "dpmpp_2m", "karras", 1], conditions),
        node(4, "CheckpointLoaderSimple", ["v1-5.safetensors"], {}),
        node(5, "EmptyLatentImage", [512, 768, 1], {}),
        node(6, "CLIPTextEncode", ["red heart"], {"clip": 5}),
        node(7, "CLIPTextEncode", ["blurry"], {"clip": 5}),
        node(8, "VAEDecode", [], {"samples": 6}),
        node(9, "SaveImage", ["ComfyUI"], {"images": 7}),
        node(10, "PrimitiveNode", [5, "fixed"], {}),
        node(11, "KSampler", [1, "fixed", 1, 1, "euler", "normal", 1], {}, mode=2),
    ]
    rows = [(4, 0, 3), (6, 0, 3), (7, 0, 3), (5, 0, 3), (4, 1, 6), (3, 0, 8), (8, 0, 9), (10, 0, 3)]
    links = [[i + 1, start, slot, end, 0, "*"] for i, (start, slot, end) in enumerate(rows)]
    found = find_settings({"workflow": json.dumps({"nodes": nodes, "links": links})}, "x.png")
    assert found.values == VALUES
