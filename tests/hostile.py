"""Values that no key of a JSON file should have, of every type and of sizes that nothing has."""

from __future__ import annotations

from typing import Any

OTHER_TYPES: list[Any] = [
    *(None, True, -1, 0, 0.5, 10**12, 10**30, -(10**30), 1e308, float("inf"), -float("inf"), "x", "y" * 5000, "", "1"),
    *([], {}, [[]], [{}], [None], ["x"], [0], [-1], [10**12] * 2, [8] * 50, [True, True], {"a": 1}, [[8], [8]]),
]


def changed(content: dict[str, Any], value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The content with the value in the place of each of its own, one a time, and of those of its inner mappings."""
    found = [(key, content | {key: value}) for key in content]
    for key, inner in content.items():
        if isinstance(inner, dict):
            found += [(f"{key}.{at}", content | {key: other}) for at, other in changed(inner, value)]
    return found
