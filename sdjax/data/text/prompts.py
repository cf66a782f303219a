"""A1111's prompt syntax: emphasis by brackets, BREAK, and prompts longer than one text encoder's length.

`(word)` weighs 1.1, `(word:1.2)` 1.2, `[word]` 1 / 1.1, nested brackets multiply; `\\(` and the like are plain
brackets; BREAK begins a new chunk (AUTOMATIC1111/stable-diffusion-webui modules/prompt_parser.py and
modules/sd_hijack_clip.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sdjax.data.text.tokenizers import Token, Tokenizer

EMPHASIS = 1.1
COMMA_REACH = 20
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
SYNTAX = re.compile(rf"\\[()\[\]\\]|\\|[(\[]|:(?P<weight>{NUMBER})\)|[)\]]|[^\\()\[\]:]+|:")
CLOSING = {")": ("(", EMPHASIS), "]": ("[", 1 / EMPHASIS)}
BREAK = re.compile(r"\s*\bBREAK\b\s*")
TAG = re.compile(r"<\w+:[^<>]+>")
NOT_UNDERSTOOD = (
    (re.compile(r"\[[^\[\]|]*:\s*[.\d]+\s*\]"), "prompt editing is not supported; its words are read, in brackets"),
    (re.compile(r"\[[^\[\]]*\|[^\[\]]*\]"), "alternating words are not supported; all are read, in brackets"),
    (re.compile(r"\bAND\b"), "composed prompts are not supported; AND is read as a word"),
    (re.compile(rf":(?!{NUMBER}\))\s*[+-]?[.\d]+\s*\)"), "not a weight; it is read as words"),
)


Weighted = tuple[Token, float]


class Report(NamedTuple):
    """A warning about a prompt.

    Attributes:
        kind: "cut" for text that no longer fits, "not understood" for syntax that has no effect here.
        text: the piece of the prompt.
        why: what became of it, a phrase.
    """

    kind: Literal["cut", "not understood"]
    text: str
    why: str


class Span(NamedTuple):
    """Words that share a weight."""

    text: str
    weight: float = 1.0


class Parsed(NamedTuple):
    """A prompt's spans, in the sections that BREAK divides it into (one where there is none)."""

    sections: list[list[Span]]
    reports: list[Report]


class Chunks(NamedTuple):
    """A prompt as text encoders take it: each chunk is BOS, tokens, EOS and pads; what is no token weighs 1."""

    ids: Int[np.ndarray, "*b n l"]
    weights: Float[np.ndarray, "*b n l"]


def parse(prompt: str) -> Parsed:
    """Reads the brackets of a prompt.

    As in A1111 a bracket that is never closed reaches to the end, one that was never opened is a character, and a
    backslash before any other character is dropped. Unlike there, BREAK works inside brackets too.
    """
    texts: list[str | None] = []  # None is BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    reports = [Report("not understood", tag, "an unknown tag; it is left out") for tag in TAG.findall(prompt)]
    prompt = TAG.sub("", prompt)
    reports += _not_understood(prompt)

    def add(text: str | None) -> None:
        texts.append(text)
        weights.append(1.0)

    def multiply(first: int, factor: float) -> None:
        weights[first:] = [weight * factor for weight in weights[first:]]

    for match in SYNTAX.finditer(prompt):
        token, weight = match[0], match["weight"]
        # The bracket that this closes, and by what it multiplies.
        bracket, factor = ("(", float(weight)) if weight is not None else CLOSING.get(token, ("", 1.0))
        if token in opened:
            opened[token].append(len(texts))
        elif bracket and opened[bracket]:
            multiply(opened[bracket].pop(), factor)
        elif token.startswith("\\"):
            add(token[1:])
        else:
            if bracket:
                reports.append(Report("not understood", token, "the bracket was never opened; it is a character"))
            for i, part in enumerate(BREAK.split(token)):
                if i > 0:
                    add(None)
                add(part)
    for bracket, factor in CLOSING.values():
        for first in opened[bracket]:
            reports.append(Report("not understood", bracket, "the bracket is never closed; it reaches to the end"))
            multiply(first, factor)
    return Parsed(_sections(texts, weights), reports)


def chunk(tokenizer: Tokenizer, prompt: str) -> tuple[Chunks, list[Report]]:
    """A prompt of any length in chunks of `tokenizer.length` - 2 tokens, [n, l], n at least 1.

    Where a chunk ends within 20 tokens after a comma, what follows the comma goes to the next chunk. The vectors of a
    textual inversion stay in one chunk. A prompt of one chunk without brackets has the ids of `Tokenizer.encode`.
    """
    sections, reports = parse(prompt)
    rows: list[list[Weighted]] = []
    for section in sections:
        weighted = [(token, span.weight) for span in section for token in tokenizer.tokens(span.text)]
        rows += _fill(weighted, tokenizer.length - 2, tokenizer.comma)
    if len(rows) > 1 and not rows[-1]:  # a BREAK at the end begins nothing
        rows.pop()
    ids, weights = [], np.ones((len(rows), tokenizer.length), np.float32)
    for row, target in zip(rows, weights, strict=True):
        pairs = [(i, weight) for token, weight in row for i in token.ids]
        ids.append(tokenizer.row([i for i, _ in pairs]))
        target[1 : 1 + len(pairs)] = [weight for _, weight in pairs]
    return Chunks(np.array(ids, np.int32), weights), reports


def plain(tokenizer: Tokenizer, prompt: str) -> tuple[Chunks, list[Report]]:
    """A prompt without any syntax, cut to one chunk [1, l], as diffusers reads it; every weight is 1."""
    ids = tokenizer.encode([prompt])
    cut = tokenizer.truncated([prompt])[0]
    why = f"only {tokenizer.length - 2} tokens are read"
    return Chunks(ids, np.ones(ids.shape, np.float32)), [Report("cut", cut, why)] if cut else []


def stack(tokenizer: Tokenizer, prompts: Sequence[Chunks], least: int = 1) -> Chunks:
    """Several prompts as one [b, n, l], n at least `least`: shorter ones end with chunks of the empty prompt."""
    n = max(least, *(len(prompt.ids) for prompt in prompts))
    empty = tokenizer.encode([""])
    ids = [np.concatenate([prompt.ids, *[empty] * (n - len(prompt.ids))]) for prompt in prompts]
    ones = np.ones_like(empty, np.float32)
    weights = [np.concatenate([prompt.weights, *[ones] * (n - len(prompt.ids))]) for prompt in prompts]
    return Chunks(np.stack(ids), np.stack(weights))


def _not_understood(prompt: str) -> list[Report]:
    masked = re.sub(r"\\.", "  ", prompt, flags=re.DOTALL)  # escaped brackets are no syntax
    found = [(match, why) for pattern, why in NOT_UNDERSTOOD for match in pattern.finditer(masked)]
    found.sort(key=lambda pair: pair[0].start())
    return [Report("not understood", prompt[match.start() : match.end()], why) for match, why in found]


def _sections(texts: Sequence[str | None], weights: Sequence[float]) -> list[list[Span]]:
    """Neighbours of equal weight are one span: words are tokenized as they stand, not in pieces."""
    sections: list[list[Span]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text is None:
            sections.append([])
        elif text and section and section[-1].weight == weight:
            section[-1] = Span(section[-1].text + text, weight)
        elif text:
            section.append(Span(text, weight))
    return sections


def _fill(tokens: Sequence[Weighted], room: int, comma: int | None) -> list[list[Weighted]]:
    """Tokens into rows of at most `room` ids; no tokens are one empty row."""
    rows: list[list[Weighted]] = [[]]
    used, after_comma = 0, None  # ids in the last row; where in it a comma was last, as (entries, ids) up to it
    for token, weight in tokens:
        is_comma = token.ids == (comma,)
        if is_comma:
            after_comma = (len(rows[-1]) + 1, used + 1)
        elif used == room and after_comma and room - after_comma[1] < COMMA_REACH:
            entries, ids = after_comma
            rows.append(rows[-1][entries:])
            del rows[-2][entries:]
            used, after_comma = used - ids, None
        if used + len(token.ids) > room:
            rows.append([])
            used, after_comma = 0, None
        rows[-1].append((token, weight))
        used += len(token.ids)
    return rows
