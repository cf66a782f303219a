"""ComfyUI's graphs: the sampler whose image is saved, those before it, and what their inputs lead to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from sdjax.cli.settings.graph import Graph, Link, Node, read_graph, upstream
from sdjax.cli.settings.names import COMFYUI
from sdjax.cli.settings.node_texts import text_of
from sdjax.cli.settings.settings import Settings, brief
from sdjax.core.errors import UserError

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Samplers of other authors keep these names.
SAMPLER_INPUTS = {"sampler_name", "steps", "cfg"}
SAVES = ("SaveImage", "PreviewImage")
LATENTS = ("latent_image", "latent", "samples")
# Inputs that the custom samplers take from a node of their own: the link to it, by the name that it has there.
PARTS = {
    **{"sampler_name": "sampler", "steps": "sigmas", "scheduler": "sigmas", "denoise": "sigmas", "noise_seed": "noise"},
    **dict.fromkeys(("cfg", "positive", "negative", "conditioning"), "guider"),
}
SIGMAS = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "AlignYourStepsScheduler": "ays"}
SIGMAS |= {"PolyexponentialScheduler": "polyexponential", "BetaSamplingScheduler": "beta"}
# Names of a latent's width and height.
SIZES = (("width", "height"), ("empty_latent_width", "empty_latent_height"))
# Names under which nodes hand on a number.
NUMBER_NAMES = ("value", "seed", "noise_seed", "int", "float", "number", "Value", "Number")
MOST_SAMPLERS = 8
# Nodes whose part in an image is read, or none; all others on the way are named.
READ = {
    *(*SAMPLERS, *SAVES, *SIGMAS, "KSamplerSelect", "BasicScheduler", "RandomNoise", "CFGGuider", "BasicGuider"),
    *("CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner", "CLIPSetLastLayer", "ConditioningZeroOut"),
    *("CheckpointLoaderSimple", "EmptyLatentImage", "VAEDecode", "VAEEncode", "LatentUpscaleBy", "LatentUpscale"),
    *("PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline", "Reroute"),
    *("ImageScale", "ImageScaleBy", "StringConcatenate"),
}


def read(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of the texts `prompt` and `workflow`.

    Raises:
        UserError: they are damaged, or no node samples.
    """
    graph = read_graph(texts, place)
    found, chain = Settings(place, COMFYUI), _samplers(graph, place)
    first, last = chain[-1], chain[0]
    _put_sampling(found, graph, first)
    _put_conditions(found, graph, first)
    if first is not last:
        _put_second(found, graph, first, last)
    if len(chain) > 2:
        found.notes.append(f"{len(chain) - 2} of {len(chain)} samplers in a row are not followed")
    if (saved := sum(node.kind == SAVES[0] for node in graph.values())) > 1:
        found.notes.append(f"{saved} images are saved; the settings are those of one")
    others = [node for node in upstream(graph, Link(last.key, 0)) if node.kind not in READ]
    named = {node.key: ", ".join(value for value in node.inputs.values() if isinstance(value, str)) for node in others}
    found.note_others({f"{node.kind} {node.key}": named[node.key] or "there" for node in others})
    return found


def _samplers(graph: Graph, place: str) -> list[Node]:
    """Samplers of the first image that is saved, the last one first: each goes on from the latents of the next."""
    saved = sorted((node for node in graph.values() if node.kind in SAVES), key=lambda node: SAVES.index(node.kind))
    links = [Link(node.key, 0) for node in saved] or [Link(key, 0) for key in reversed(graph)]
    chain: list[Node] = []
    while len(chain) < MOST_SAMPLERS:
        reached = (node for node in upstream(graph, *links) if _samples(node) and all(node is not n for n in chain))
        if (node := next(reached, None)) is None:
            break
        chain.append(node)
        links = [_latents(node)]
    if not chain:
        raise UserError(f"ComfyUI's graph in {place} has no sampler that is known here; known: {', '.join(SAMPLERS)}")
    return chain


def _samples(node: Node) -> bool:
    """True if it makes latents of latents; what works on images afterwards, of faces for example, does not count."""
    like_one = node.inputs.keys() >= SAMPLER_INPUTS and "image" not in node.inputs
    return node.kind in SAMPLERS or like_one


def _input(graph: Graph, node: Node, name: str) -> Any:
    """An input of a sampler, which may stand in a node that the sampler has for it."""
    if name in node.inputs or name not in PARTS:
        return node.inputs.get(name)
    return next((n.inputs[name] for n in upstream(graph, node.inputs.get(PARTS[name])) if name in n.inputs), None)


def _value(graph: Graph, node: Node, *names: str) -> Any:
    """The value of the first of some inputs, followed through the nodes that hand it on; None where there is none."""
    value = next((v for v in (_input(graph, node, name) for name in names) if v is not None), None)
    for source in upstream(graph, value):
        for name in (*names, *NUMBER_NAMES):
            if isinstance(source.inputs.get(name), str | int | float):
                return source.inputs[name]
    return None if isinstance(value, Link) else value


def _put_sampling(found: Settings, graph: Graph, node: Node) -> None:
    found.put_seed(_value(graph, node, "seed", "noise_seed"))
    found.put("steps", _value(graph, node, "steps"))
    unguided = any(part.kind == "BasicGuider" for part in upstream(graph, node.inputs.get("guider")))
    found.put("guidance_scale", 1.0 if unguided else _value(graph, node, "cfg"))
    found.put_sampler(_sampler(graph, node), _schedule(graph, node))
    found.put("rng", "torch")
    strength = _value(graph, node, "denoise")
    found.put("strength", strength if strength != 1 else None)
    sizes = ((n, names) for n in upstream(graph, _latents(node)) for names in SIZES if n.inputs.keys() >= {*names})
    for size, names in itertools.islice(sizes, 1):
        found.put_size(*(_value(graph, size, name) for name in names))
    start, steps = _value(graph, node, "start_at_step"), found.values.get("steps")
    if isinstance(start, int) and steps and 0 < start < steps:
        found.put("strength", (steps - start) / steps)


def _sampler(graph: Graph, node: Node) -> Any:
    """Its name, or the class of a node that is a sampler itself."""
    name, own = _value(graph, node, "sampler_name"), node.inputs.get("sampler")
    return name if name is not None else next((n.kind for n in upstream(graph, own)), None)


def _schedule(graph: Graph, node: Node) -> Any:
    """Its name, or that of a node which is a schedule itself."""
    name, own = _value(graph, node, "scheduler"), node.inputs.get("sigmas")
    return name if name is not None else next((SIGMAS.get(n.kind, n.kind) for n in upstream(graph, own)), None)


def _latents(node: Node) -> Any:
    return next((node.inputs[name] for name in LATENTS if name in node.inputs), None)


def _put_conditions(found: Settings, graph: Graph, node: Node) -> None:
    positive, negative = _input(graph, node, "positive"), _input(graph, node, "negative")
    positive = _input(graph, node, "conditioning") if positive is None else positive
    found.put_prompts(text_of(found, graph, positive, "positive"), text_of(found, graph, negative, "negative"))
    stops = (n.inputs["stop_at_clip_layer"] for n in upstream(graph, positive) if "stop_at_clip_layer" in n.inputs)
    if isinstance(stop := next(stops, None), int):
        found.put_clip_skip(-stop)
    for source in upstream(graph, node.inputs.get("model", node.inputs.get("guider")), through="model"):
        for name in ("ckpt_name", "unet_name"):
            if isinstance(source.inputs.get(name), str):
                found.put("model", PureWindowsPath(source.inputs[name]).stem)
                return


def _put_second(found: Settings, graph: Graph, first: Node, last: Node) -> None:
    """A refiner that takes over, or a second pass over enlarged latents."""
    end, steps = _value(graph, first, "end_at_step"), found.values.get("steps")
    if _value(graph, last, "add_noise") in ("disable", False):
        if isinstance(end, int) and steps and 0 < end < steps:
            found.put("refiner_start", end / steps)
        return
    run = _value(graph, last, "steps")
    found.put_second_pass(_factor(found, graph, first, last), _value(graph, last, "denoise"), run)
    for name in ("cfg", "sampler_name", "scheduler", "seed"):
        own, other = _value(graph, first, name), _value(graph, last, name)
        if own != other:
            found.notes.append(f"{name} {brief(other)} of the second pass is not followed: it has the first one's")


def _factor(found: Settings, graph: Graph, first: Node, last: Node) -> Any:
    """By how much the latents grow between two samplers; 1 where nothing on the way says it."""
    for node in upstream(graph, _latents(last)):
        if node is first:
            break
        if "scale_by" in node.inputs:
            return _value(graph, node, "scale_by")
        width, own = _value(graph, node, "width"), found.values.get("width")
        if isinstance(width, int) and own:
            return width / own
    return 1
