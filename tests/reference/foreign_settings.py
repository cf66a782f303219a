"""Texts of settings as other programs write them: random wishes, and each program's way to put them down.

Written from those programs' sources and images, with tables of names of their own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

Wanted = dict[str, Any]
Texts = dict[str, str]

WORDS = [
    "red heart",
    "a (cat:1.2)",
    "Größe",
    "旗",
    "8k: ultra",
    "by Alphonse",
    "50% off",
    "x\\(y\\)",
    "it's",
    '"q"',
]
PLAIN_WORDS = ["red heart", "a cat", "Größe", "旗", "ultra 8k", "by Alphonse", "it's", "night"]
# Ours: A1111's, ComfyUI's, InvokeAI's, NovelAI's; "" where a program has none.
SAMPLERS = {
    "euler": ("Euler", "euler", "euler", "k_euler"),
    "euler_a": ("Euler a", "euler_ancestral", "euler_a", "k_euler_ancestral"),
    "heun": ("Heun", "heun", "heun", ""),
    "lms": ("LMS", "lms", "lms", "k_lms"),
    "dpm2": ("DPM2", "dpm_2", "kdpm_2", "k_dpm_2"),
    "dpm2_a": ("DPM2 a", "dpm_2_ancestral", "kdpm_2_a", "k_dpm_2_ancestral"),
    "dpmpp_2m": ("DPM++ 2M", "dpmpp_2m", "dpmpp_2m", "k_dpmpp_2m"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde", "k_dpmpp_2m_sde"),
    "dpmpp_3m_sde": ("DPM++ 3M SDE", "dpmpp_3m_sde", "", ""),
    "dpmpp_sde": ("DPM++ SDE", "dpmpp_sde", "dpmpp_sde", "k_dpmpp_sde"),
    "dpmpp_2s_a": ("DPM++ 2S a", "dpmpp_2s_ancestral", "", "k_dpmpp_2s_ancestral"),
}
LABEL, NODE, INVOKE, NOVEL = range(4)
# Ours: A1111's, ComfyUI's, NovelAI's.
SCHEDULES = {
    "karras": ("Karras", "karras", "karras"),
    "exponential": ("Exponential", "exponential", "exponential"),
    "linspace": ("Uniform", "normal", "native"),
    "sgm_uniform": ("SGM Uniform", "sgm_uniform", ""),
    "simple": ("Simple", "simple", ""),
    "beta": ("Beta", "beta", ""),
    "leading": ("DDIM", "ddim_uniform", ""),
    "kl_optimal": ("KL Optimal", "kl_optimal", ""),
}
NOVEL_SCHEDULE = 2


# Of InvokeAI's version 2.
K_SAMPLERS = {"euler": "k_euler", "euler_a": "k_euler_a", "heun": "k_heun", "lms": "k_lms", "dpm2": "k_dpm_2"}
K_SAMPLERS |= {"dpm2_a": "k_dpm_2_a", "ddim": "ddim", "plms": "plms"}


class Writer(NamedTuple):
    """A program: how it writes, the words that it writes as they are, and samplers and schedules that it knows."""

    write: Callable[[Wanted, random.Random], Texts]
    words: list[str] = WORDS
    samplers: Collection[str] = tuple(SAMPLERS)
    schedules: Collection[str | None] = tuple(SCHEDULES)
    most_lines: int = 3


def wanted(rng: random.Random, writer: Writer) -> Wanted:
    """Settings of an image, in our names."""
    words = writer.words
    lines = [", ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(rng.randint(1, writer.most_lines))]
    return {
        "prompt": "\n".join(lines),
        "negative_prompt": rng.choice(["", ", ".join(rng.choices(words, k=3))]),
        "steps": rng.randint(1, 150),
        "sampler": rng.choice(list(writer.samplers)),
        "schedule": rng.choice(list(writer.schedules)),
        "guidance_scale": rng.choice([1.0, 5.5, 7.0, 7.25, 30.0]),
        "seed": rng.choice([0, rng.randrange(2**32), rng.randrange(2**64)]),
        "width": 8 * rng.randint(1, 256),
        "height": 8 * rng.randint(1, 256),
        "model": rng.choice(["v1-5", "some model v2 final", "anything_v3 [x]"]),
    }


def a1111(wish: Wanted, rng: random.Random) -> Texts:
    """Version 1.9 or later, which names the schedule, or an earlier one, where it ends the sampler's name."""
    sampler, schedule = SAMPLERS[wish["sampler"]][LABEL], SCHEDULES[wish["schedule"]][0]
    old = wish["schedule"] in ("karras", "exponential") and rng.random() < 0.5
    pairs: dict[str, Any] = {"Steps": wish["steps"], "Sampler": f"{sampler} {schedule}" if old else sampler}
    pairs |= {} if old else {"Schedule type": schedule}
    pairs |= {"CFG scale": f"{wish['guidance_scale']:g}", "Seed": wish["seed"]}
    pairs |= {"Size": f"{wish['width']}x{wish['height']}", "Model hash": "45dee52b", "Model": wish["model"]}
    extra = {
        "VAE hash": "735e4c3a44",
        "Lora hashes": "a: 1, b: 2",
        "TI hashes": "easyneg: 89ab",
        "ControlNet 0": 'Module: canny, Model: "x", Weight: 1',
        "RP Ratios": "1,1",
        "Tiling": "True",
        "Hashes": '{"vae": "735e4c3a44", "model": "879db523c3"}',
    }
    pairs |= {name: extra[name] for name in rng.sample(list(extra), k=rng.randint(0, 4))}
    pairs |= {"Version": "v1.6.0" if old else "v1.10.1"}
    line = ", ".join(f"{name}: {_quoted(name, value)}" for name, value in pairs.items())
    return {"parameters": _joined(wish, line)}


def forge(wish: Wanted, rng: random.Random) -> Texts:
    return {"parameters": a1111(wish, rng)["parameters"].replace("Version: v", "Version: f2.0.1v")}


def sdnext(wish: Wanted, rng: random.Random) -> Texts:
    """Its sampler has its schedule beside it; empty negative prompts are written, too."""
    pairs = {
        "Steps": wish["steps"],
        "Size": f"{wish['width']}x{wish['height']}",
        "Sampler": SAMPLERS[wish["sampler"]][LABEL],
        "Scheduler": SCHEDULES[wish["schedule"]][0],
        "Seed": wish["seed"],
        "CFG scale": wish["guidance_scale"],
        "App": "SD.Next",
        "Version": "9187e2d",
        "Pipeline": "StableDiffusionPipeline",
        "Operations": "txt2img; upscale",
        "Model": wish["model"],
    }
    line = ", ".join(f"{name}: {_quoted(name, value)}" for name, value in pairs.items())
    return {"parameters": f"{wish['prompt']}\nNegative prompt: {wish['negative_prompt']}\n{line}"}


def fooocus(wish: Wanted, rng: random.Random) -> Texts:
    content = {
        "adm_guidance": "(1.5, 0.8, 0.3)",
        "base_model": wish["model"],
        "base_model_hash": "e6bb9ea85b",
        "clip_skip": 2,
        "full_negative_prompt": [wish["negative_prompt"]] if wish["negative_prompt"] else [""],
        "full_prompt": [wish["prompt"]],
        "guidance_scale": wish["guidance_scale"],
        "loras": [["detail", 0.1, "4d3a9c"]],
        "metadata_scheme": "fooocus",
        "negative_prompt": wish["negative_prompt"],
        "performance": "Speed",
        "prompt": wish["prompt"],
        "refiner_model": "None",
        "refiner_switch": 0.5,
        "resolution": str((wish["width"], wish["height"])),
        "sampler": SAMPLERS[wish["sampler"]][NODE],
        "scheduler": SCHEDULES[wish["schedule"]][1],
        "seed": str(wish["seed"]),
        "sharpness": 2.0,
        "steps": wish["steps"],
        "styles": "[]",
        "version": "Fooocus v2.5.5",
    }
    return {"parameters": json.dumps(content), "fooocus_scheme": "fooocus"}


def fooocus_a1111(wish: Wanted, rng: random.Random) -> Texts:
    label = SAMPLERS[wish["sampler"]][LABEL] + (" Karras" if wish["schedule"] == "karras" else "")
    pairs = {
        "Steps": wish["steps"],
        "Sampler": label,
        "Seed": wish["seed"],
        "Size": f"{wish['width']}x{wish['height']}",
        "CFG scale": wish["guidance_scale"],
        "Sharpness": 2.0,
        "ADM Guidance": "(1.5, 0.8, 0.3)",
        "Model": wish["model"],
        "Model hash": "e6bb9ea85b",
        "Performance": "Speed",
        "Scheduler": SCHEDULES[wish["schedule"]][1],
        "VAE": "Default (model)",
        "Raw prompt": wish["prompt"],
        "Lora hashes": "detail: 4d3a9c",
        "Lora weights": "detail: 0.1",
        "Version": "Fooocus v2.5.5",
    }
    line = ", ".join(f"{name}: {_quoted(name, value)}" for name, value in pairs.items())
    return {"parameters": _joined(wish, line), "fooocus_scheme": "a1111"}


def swarmui(wish: Wanted, rng: random.Random) -> Texts:
    content = {
        "prompt": wish["prompt"],
        "negativeprompt": wish["negative_prompt"],
        "model": wish["model"],
        "seed": wish["seed"],
        "steps": wish["steps"],
        "cfgscale": wish["guidance_scale"],
        "aspectratio": "Custom",
        "width": wish["width"],
        "height": wish["height"],
        "sampler": SAMPLERS[wish["sampler"]][NODE],
        "scheduler": SCHEDULES[wish["schedule"]][1],
        "swarm_version": "0.9.4.0",
    }
    extra = {"date": "2024-08-07", "generation_time": "143.17 (prep) and 35.81 (gen) seconds"}
    return {"parameters": json.dumps({"sui_image_params": content, "sui_extra_data": extra}, indent=2)}


def invokeai(wish: Wanted, rng: random.Random) -> Texts:
    """Version 3 on; its models' schedules are the checkpoint's own, or Karras'."""
    name = SAMPLERS[wish["sampler"]][INVOKE]
    keyed = rng.random() < 0.5
    model = {"name": wish["model"], "key": "a-b", "hash": "blake3:0", "base": "sd-1", "type": "main"}
    content = {
        "app_version": "4.2.0" if keyed else "3.0.2",
        "generation_mode": "txt2img",
        "positive_prompt": wish["prompt"],
        "negative_prompt": wish["negative_prompt"],
        "width": wish["width"],
        "height": wish["height"],
        "seed": wish["seed"],
        "rand_device": "cpu",
        "cfg_scale": wish["guidance_scale"],
        "cfg_rescale_multiplier": 0.0,
        "steps": wish["steps"],
        "scheduler": f"{name}_k" if wish.get("schedule") == "karras" else name,
        "clip_skip": 0,
        "model": model if keyed else {"model_name": wish["model"], "base_model": "sd-1", "model_type": "main"},
        "controlnets": [],
        "loras": [],
    }
    return {"invokeai_metadata": json.dumps(content), "invokeai_graph": "{}"}


def invokeai_2(wish: Wanted, rng: random.Random) -> Texts:
    """Version 2: the negative prompt stands in brackets."""
    negative = f" [{wish['negative_prompt']}]" if wish["negative_prompt"] else ""
    image = {
        "prompt": [{"prompt": wish["prompt"] + negative, "weight": 1.0}],
        "steps": wish["steps"],
        "cfg_scale": wish["guidance_scale"],
        "threshold": 0,
        "perlin": 0,
        "height": wish["height"],
        "width": wish["width"],
        "seed": wish["seed"],
        "seamless": False,
        "hires_fix": False,
        "type": "txt2img",
        "postprocessing": None,
        "sampler": K_SAMPLERS[wish["sampler"]],
        "variations": [],
    }
    top = {"model": "stable diffusion", "model_weights": wish["model"], "model_hash": "0", "app_version": "2.2.5"}
    return {"sd-metadata": json.dumps({**top, "app_id": "invoke-ai/InvokeAI", "image": image})}


def invokeai_dream(wish: Wanted, rng: random.Random) -> Texts:
    """The command line of versions 1 and 2."""
    negative = f" [{wish['negative_prompt']}]" if wish["negative_prompt"] else ""
    flags = f"-s {wish['steps']} -S {wish['seed']} -W {wish['width']} -H {wish['height']} -C {wish['guidance_scale']}"
    return {"Dream": f'"{wish["prompt"]}{negative}" {flags} -A {K_SAMPLERS[wish["sampler"]]}'}


def novelai(wish: Wanted, rng: random.Random) -> Texts:
    version_4 = rng.random() < 0.5
    content: dict[str, Any] = {
        "prompt": wish["prompt"],
        "steps": wish["steps"],
        "height": wish["height"],
        "width": wish["width"],
        "scale": wish["guidance_scale"],
        "uncond_scale": 0.0,
        "cfg_rescale": 0.25,
        "seed": wish["seed"],
        "n_samples": 1,
        "noise_schedule": SCHEDULES[wish["schedule"]][NOVEL_SCHEDULE],
        "sampler": SAMPLERS[wish["sampler"]][NOVEL],
        "sm": False,
        "uc": wish["negative_prompt"],
        "request_type": "PromptGenerateRequest",
    }
    if version_4:
        captions = {"v4_prompt": wish["prompt"], "v4_negative_prompt": wish["negative_prompt"]}
        content |= {n: {"caption": {"base_caption": text, "char_captions": []}} for n, text in captions.items()}
    title = {"Title": "NovelAI generated image", "Software": "NovelAI", "Source": wish["model"]}
    return {**title, "Description": wish["prompt"], "Comment": json.dumps(content)}


def comfyui(wish: Wanted, rng: random.Random) -> Texts:
    """The default graph: the API's form, and the links of the editor's. Ids are shuffled."""
    ids = [str(number) for number in rng.sample(range(1, 99), k=8)]
    sampler, model, latent, positive, negative, decode, save, seed = ids
    linked = rng.random() < 0.5
    settings = {
        "seed": [seed, 0] if linked else wish["seed"],
        "steps": wish["steps"],
        "cfg": wish["guidance_scale"],
        "sampler_name": SAMPLERS[wish["sampler"]][NODE],
        "scheduler": SCHEDULES[wish["schedule"]][1],
        "denoise": 1.0,
    }
    links = {"model": [model, 0], "positive": [positive, 0], "negative": [negative, 0], "latent_image": [latent, 0]}
    size = {"width": wish["width"], "height": wish["height"], "batch_size": 1}
    graph = {
        model: ("CheckpointLoaderSimple", {"ckpt_name": f"sub\\{wish['model']}.safetensors"}),
        latent: ("EmptyLatentImage", size),
        positive: ("CLIPTextEncode", {"text": wish["prompt"], "clip": [model, 1]}),
        negative: ("CLIPTextEncode", {"text": wish["negative_prompt"], "clip": [model, 1]}),
        sampler: ("KSampler", settings | links),
        decode: ("VAEDecode", {"samples": [sampler, 0], "vae": [model, 2]}),
        save: ("SaveImage", {"filename_prefix": "ComfyUI", "images": [decode, 0]}),
    }
    if linked:
        graph[seed] = ("PrimitiveInt", {"value": wish["seed"]})
    graph = {key: graph[key] for key in rng.sample(list(graph), k=len(graph))}
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
    rows = []
    for key, (_, inputs) in graph.items():
        for slot, (name, value) in enumerate(inputs.items()):
            if isinstance(value, list):
                kind = "CLIP" if name == "clip" else "CONDITIONING"
                rows.append([len(rows) + 1, int(value[0]), value[1], int(key), slot, kind])
    return {"prompt": json.dumps(prompt), "workflow": json.dumps({"nodes": [], "links": rows})}


def comfyui_editor(wish: Wanted, rng: random.Random) -> Texts:
    """The default graph in the editor's form alone, the seed on a primitive node or not; one node takes no part."""
    ids = rng.sample(range(1, 99), k=9)
    sampler, model, latent, positive, negative, decode, save, seed, unused = ids
    names = SAMPLERS[wish["sampler"]][NODE], SCHEDULES[wish["schedule"]][1]
    linked = rng.random() < 0.5
    kinds = {
        sampler: (
            "KSampler",
            [0 if linked else wish["seed"], "fixed", wish["steps"], wish["guidance_scale"], *names, 1],
        ),
        model: ("CheckpointLoaderSimple", [f"{wish['model']}.safetensors"]),
        latent: ("EmptyLatentImage", [wish["width"], wish["height"], 1]),
        positive: ("CLIPTextEncode", [wish["prompt"]]),
        negative: ("CLIPTextEncode", [wish["negative_prompt"]]),
        decode: ("VAEDecode", []),
        save: ("SaveImage", ["ComfyUI"]),
        seed: ("PrimitiveNode", [wish["seed"], "randomize"]),
        unused: ("KSampler", [1, "fixed", 1, 1, "euler", "normal", 1]),
    }
    ends = [(model, 0, sampler, "model"), (positive, 0, sampler, "positive"), (negative, 0, sampler, "negative")]
    ends += [(latent, 0, sampler, "latent_image"), (model, 1, positive, "clip"), (model, 1, negative, "clip")]
    ends += [(sampler, 0, decode, "samples"), (model, 2, decode, "vae"), (decode, 0, save, "images")]
    ends += [(seed, 0, sampler, "seed")] if linked else []
    slots: dict[int, list[dict[str, Any]]] = {key: [] for key in kinds}
    links = []
    for number, (start, slot, end, name) in enumerate(ends, 1):
        links.append([number, start, slot, end, len(slots[end]), "*"])
        slots[end].append({"name": name, "type": "*", "link": number})
    nodes = [
        {"id": key, "type": kind, "mode": 4 if key == unused else 0, "inputs": slots[key], "widgets_values": values}
        for key, (kind, values) in kinds.items()
    ]
    rng.shuffle(nodes)
    return {"workflow": json.dumps({"last_node_id": 99, "nodes": nodes, "links": links, "version": 0.4})}


def _known(column: int) -> list[str]:
    return [name for name, labels in SAMPLERS.items() if labels[column]]


_NOVEL = [name for name, labels in SCHEDULES.items() if labels[NOVEL_SCHEDULE]]
WRITERS = {
    "A1111": Writer(a1111),
    "Forge": Writer(forge),
    "SD.Next": Writer(sdnext),
    "Fooocus": Writer(fooocus),
    "Fooocus as A1111": Writer(fooocus_a1111),
    "SwarmUI": Writer(swarmui),
    "InvokeAI": Writer(invokeai, PLAIN_WORDS, _known(INVOKE), ("karras", None)),
    "InvokeAI 2": Writer(invokeai_2, PLAIN_WORDS, K_SAMPLERS, (None,)),
    "InvokeAI 1": Writer(invokeai_dream, PLAIN_WORDS, K_SAMPLERS, (None,), most_lines=1),
    "NovelAI": Writer(novelai, PLAIN_WORDS, _known(NOVEL), _NOVEL),
    "ComfyUI": Writer(comfyui),
    "ComfyUI's editor": Writer(comfyui_editor),
}


def _joined(wish: Wanted, line: str) -> str:
    negative = f"\nNegative prompt: {wish['negative_prompt']}" if wish["negative_prompt"] else ""
    return f"{wish['prompt']}{negative}\n{line}"


def _quoted(name: str, value: Any) -> str:
    """A1111's quote(): JSON where a value holds a mark of the line; its own few exceptions are as they are."""
    text = str(value)
    if name in ("Hashes", "RP Ratios") or not any(mark in text for mark in ",\n:"):
        return text
    return json.dumps(text, ensure_ascii=False)
