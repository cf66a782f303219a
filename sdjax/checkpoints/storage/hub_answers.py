"""Answers of a Hub, checked before its client makes paths of what they say.

huggingface_hub 2.4 joins a commit's id and a file's ETag to the path of its cache as they are: for an endpoint that
answers "../.." in their place it would write elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import get_session

from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[A-Za-z0-9_-]{1,128}")
FILE = re.compile(r"(?!/|(.*/)?\.\.(/|$))[^\\\x00-\x1f]+")
NAMES = {COMMIT: "commit", DIGEST: "digest", FILE: "name of a file in a repository"}
ETAGS = ("ETag", "X-Linked-Etag")
SHOWN = 80


def check_answers() -> None:
    """Has the client check every answer from now on."""
    hooks = get_session().event_hooks["response"]
    if check_answer not in hooks:
        hooks.append(check_answer)


def check_answer(response: Any) -> None:
    """An event hook of the client.

    Raises:
        UserError: a commit, a digest or a file's name is none, which no Hub answers.
    """
    for pattern, said in _named(response):
        if not isinstance(said, str) or not pattern.fullmatch(said):
            raise UserError(f"{response.url.host} answers as no Hub does: {str(said)[:SHOWN]!r} is no {NAMES[pattern]}")


def _named(response: Any) -> Iterator[tuple[Any, Any]]:
    """Facts of an answer that become part of a path, each with its form."""
    headers = response.headers
    if "X-Repo-Commit" in headers:
        yield COMMIT, headers["X-Repo-Commit"]
        for name in ETAGS:
            if name in headers:
                yield DIGEST, headers[name].removeprefix("W/").strip('"')
    if response.status_code == 200 and "/api/" in response.url.path:
        content = parse_json(response.read(), response.url)
        for entry in content if isinstance(content, list) else [content]:
            yield from _in_entry(entry if isinstance(entry, dict) else {})


def _in_entry(entry: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The same of a model's description, or of a file in a listing."""
    if "sha" in entry:
        yield COMMIT, entry["sha"]
    siblings = entry.get("siblings")
    for file in siblings if isinstance(siblings, list) else []:
        yield FILE, file.get("rfilename") if isinstance(file, dict) else file
    if "path" in entry:
        yield FILE, entry["path"]
    for stored in (entry, entry.get("lfs")):
        if isinstance(stored, dict) and "oid" in stored:
            yield DIGEST, stored["oid"]
