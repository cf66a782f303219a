"""ComfyUI's graphs: the API's form, and the editor's, whose widgets are put under the names of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

# Widgets of ComfyUI's own nodes in the editor's order (its nodes.py and comfy_extras); "" for buttons.
_ADVANCED = ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler", "start_at_step", "end_at_step")
WIDGETS: dict[str, tuple[str, ...]] = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (*_ADVANCED, "return_with_leftover_noise"),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KarrasScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "RandomNoise": ("noise_seed", ""),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("ascore", "width", "height", "text"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "ImageScale": ("upscale_method", "width", "height", "crop"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "UpscaleModelLoader": ("model_name",),
    "LoadImage": ("image", "upload"),
    "VAELoader": ("vae_name",),
    "ControlNetApply": ("strength",),
    "ControlNetApplyAdvanced": ("strength", "start_percent", "end_percent"),
    "ControlNetLoader": ("control_net_name",),
    "PrimitiveNode": ("value", ""),
    "PrimitiveInt": ("value", ""),
    "PrimitiveFloat": ("value",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "StringConcatenate": ("string_a", "string_b", "delimiter"),
    "ModelSamplingDiscrete": ("sampling", "zsnr"),
    "RescaleCFG": ("multiplier",),
    "FreeU": ("b1", "b2", "s1", "s2"),
    "FreeU_V2": ("b1", "b2", "s1", "s2"),
    "SaveImage": ("filename_prefix",),
}
# Written into the API's form for nodes that always run anew.
NOT_JSON = '"is_changed": [NaN]', '"is_changed": [null]'
# Modes of the editor's nodes that take no part: never, and bypassed.
OFF = (2, 4)


class Node(NamedTuple):
    """A node: its id, its class, and its inputs by name, each a value or a `Link`."""

    key: str
    kind: str
    inputs: Mapping[str, Any]


class Link(NamedTuple):
    """The node, and which of its outputs an input takes."""

    key: str
    slot: int


Graph = dict[str, Node]


def read_graph(texts: Mapping[str, str], place: str) -> Graph:
    """The nodes of `prompt`, or of `workflow` where that has none, by their ids.

    Raises:
        UserError: the texts are damaged, or hold no nodes.
    """
    for name, parse in (("prompt", _api), ("workflow", _editor)):
        if name in texts:
            content = parse_json(texts[name].replace(*NOT_JSON).encode(), f"the {name} text of {place}")
            if isinstance(content, dict) and (graph := parse(content)):
                return graph
    raise UserError(f"the settings of {place} are damaged: ComfyUI's graph has no nodes")


def upstream(graph: Graph, *starts: Any, through: str | None = None) -> Iterator[Node]:
    """The nodes of links and all that they depend on, nearest first.

    Args:
        graph: of the nodes.
        starts: where to begin; nothing follows from what is no link.
        through: the only input to follow where a node has it, e.g. "model".
    """
    queue, seen = list(starts), set()
    for link in queue:
        node = graph.get(link.key) if isinstance(link, Link) else None
        if node is None or node.key in seen:
            continue
        seen.add(node.key)
        yield node
        queue += [node.inputs[through]] if through and through in node.inputs else node.inputs.values()


def _api(content: Mapping[str, Any]) -> Graph:
    graph = {}
    for key, node in content.items():
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict):
            inputs = {name: _link(value) for name, value in node["inputs"].items()}
            graph[str(key)] = Node(str(key), node["class_type"], inputs)
    return graph


def _link(value: Any) -> Any:
    """A value, or a link in the form [id, output]."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int):
        return Link(str(value[0]), value[1])
    return value


def _editor(content: Mapping[str, Any]) -> Graph:
    """The editor's form: links are [id, from, output, to, input, type], nodes without a part are passed by."""
    nodes = [node for node in _list(content.get("nodes")) if isinstance(node, dict)]
    links = {str(row[0]): Link(str(row[1]), row[2]) for row in _list(content.get("links")) if _is_link(row)}
    graph = {}
    for node in nodes:
        if node.get("mode") in OFF or not isinstance(node.get("type"), str):
            continue
        inputs, values = {}, node.get("widgets_values")
        names = WIDGETS.get(node["type"], ())
        inputs |= values if isinstance(values, dict) else dict(zip(names, _list(values), strict=False))
        inputs.pop("", None)
        for slot in _list(node.get("inputs")):
            if isinstance(slot, dict) and (link := links.get(str(slot.get("link")))):
                inputs[str(slot.get("name"))] = link
        graph[str(node.get("id"))] = Node(str(node.get("id")), node["type"], inputs)
    return graph


def _is_link(row: Any) -> bool:
    return isinstance(row, list) and len(row) >= 5 and isinstance(row[2], int)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
