"""Texts that a graph's conditions lead to."""

from __future__ import annotations

from typing import Any

from sdjax.cli.settings.graph import Graph, Link, Node
from sdjax.cli.settings.settings import Settings
from sdjax.core.errors import UserError

# Names under which nodes keep a text, or take it from another.
TEXTS = ("text", "text_g", "text_l", "value", "string", "String", "prompt", "populated_text", "wildcard_text")
JOINED = ("string_a", "string_b")
# Inputs of nodes that have several, through which a text comes to a condition.
CONDITIONS = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from")
DEEPEST, LONGEST = 64, 2**20


def text_of(found: Settings, graph: Graph, link: Any, role: str) -> str:
    """The text of a condition.

    Args:
        found: takes a note where several texts are joined, and a refusal where there is none.
        graph, link, role: "positive" or "negative", which nodes that hand on both call their inputs.
    """
    if isinstance(link, str):
        return link
    texts = list(dict.fromkeys(_texts(graph, link, role, {})))
    if len(texts) > 1:
        found.notes.append(f"{len(texts)} {role} texts of the graph are read as one prompt")
    if not texts and role == "positive":
        found.refused["prompt"] = UserError(
            f"ComfyUI's graph in {found.place} leads to no prompt; give one by --prompt"
        )
    return ", ".join(texts)


def _texts(graph: Graph, link: Any, role: str, known: dict[str, list[str]], depth: int = 0) -> list[str]:
    """Texts of a link, each node's once."""
    node = graph.get(link.key) if isinstance(link, Link) else None
    if node is None or depth > DEEPEST or node.kind == "ConditioningZeroOut":
        return []
    if node.key not in known:
        known[node.key] = []
        parts = [
            [value] if isinstance(value, str) else _texts(graph, value, role, known, depth + 1)
            for value in _sources(node, role)
        ]
        texts = [text for part in parts for text in part]
        if node.kind == "StringConcatenate":
            delimiter = node.inputs.get("delimiter")
            texts = [(delimiter if isinstance(delimiter, str) else "").join(texts)]
        if sum(map(len, texts)) <= LONGEST:
            known[node.key] = texts
    return known[node.key]


def _sources(node: Node, role: str) -> list[Any]:
    """Inputs of a node that lead to its text: its own, those of its role, or all that are conditions."""
    for names in (JOINED, TEXTS, (role,), CONDITIONS):
        if values := [node.inputs[name] for name in names if name in node.inputs]:
            return values
    return [value for value in node.inputs.values() if isinstance(value, Link)]
