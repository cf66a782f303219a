"""A1111's prompt syntax: emphasis by brackets, BREAK, and prompts longer than one text encoder's length.

`(word)` weighs 1.1, `(word:1.2)` 1.2, `[word]` 1 / 1.1, nested brackets multiply; `\\(` and the like are plain
brackets; BREAK begins a new chunk (AUTOMATIC1111/stable-diffusion-webui modules/prompt_parser.py and
modules/sd_hijack_clip.py).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sdjax.core.errors import UserError
from sdjax.data.text.tokenizers import Token, Tokenizer

EMPHASIS = 1.1
COMMA_REACH = 20
MOST_WEIGHT = float(np.finfo(np.float32).max)
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
SYNTAX = re.compile(rf"\\[()\[\]\\]|\\|[(\[]|:\s*(?P<weight>{NUMBER})\s*\)|[)\]]|[^\\()\[\]:]+|:")
CLOSING = {")": ("(", EMPHASIS), "]": ("[", 1 / EMPHASIS)}
BREAK = re.compile(r"\bBREAK\b")
TAG = re.compile(r"<\w+:[^<>]+>")
NOT_UNDERSTOOD = (
    (re.compile(r"\bAND\b"), "negative prompts are not composed; it is read as a word"),
    (re.compile(rf":(?!\s*{NUMBER}\s*\))\s*[+-]?[.\d]+\s*\)"), "not a weight; it is read as words"),
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
    """Read the brackets of a prompt, in linear time.

    As in A1111 a bracket that is never closed reaches to the end, one that was never opened is a character, and a
    backslash before any other character is dropped. Unlike there, BREAK works inside brackets too.
    """
    reports = [Report("not understood", tag, "left out; lora and lora_dir give LoRAs") for tag in TAG.findall(prompt)]
    prompt = TAG.sub("", prompt)
    tokens = list(SYNTAX.finditer(prompt))
    factors, closing, unmatched = _match_brackets(tokens)
    around = {"(": [1.0], "[": [1.0]}  # products of the factors of all open brackets of a kind
    sections: list[list[Span]] = [[]]
    for i, token in enumerate(match[0] for match in tokens):
        if i in factors:
            around[token].append(around[token][-1] * factors[i])
        elif i in closing:
            around[closing[i]].pop()
        else:
            weight = around["("][-1] * around["["][-1]
            first, *others = _divide(token[1:] if token.startswith("\\") else token)
            sections[-1].append(Span(first, weight))
            sections += [[Span(text, weight)] for text in others]
    reports += [*_not_understood(prompt), *unmatched]
    return Parsed([_joined(section) for section in sections], list(dict.fromkeys(reports)))


def chunk(tokenizer: Tokenizer, prompt: str) -> tuple[Chunks, list[Report]]:
    """A prompt of any length in chunks of `tokenizer.length` - 2 tokens, [n, l], n at least 1.

    Where a chunk ends within 20 tokens after a comma, what follows the comma goes to the next chunk. The vectors of a
    textual inversion stay in one chunk. A prompt of one chunk without brackets has the ids of `Tokenizer.encode`.

    Raises:
        UserError: brackets are nested so deep that a weight is no float32.
    """
    sections, reports = parse(prompt)
    if not all(abs(span.weight) <= MOST_WEIGHT for section in sections for span in section):
        raise UserError(f"the prompt {prompt[:40]!r} has a weight above {MOST_WEIGHT:.2g}; nest fewer brackets")
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


def _match_brackets(tokens: Sequence[re.Match[str]]) -> tuple[dict[int, float], dict[int, str], list[Report]]:
    """Factors of the brackets that open, brackets that others close, both by the token's number, and mismatches."""
    factors: dict[int, float] = {}
    closing: dict[int, str] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    reports = []
    for i, match in enumerate(tokens):
        token, weight = match[0], match["weight"]
        bracket, factor = ("(", float(weight)) if weight is not None else CLOSING.get(token, ("", 1.0))
        if token in opened:
            opened[token].append(i)
        elif bracket and opened[bracket]:
            factors[opened[bracket].pop()], closing[i] = factor, bracket
        elif bracket:
            reports.append(Report("not understood", token, "the bracket was never opened; it is a character"))
    for bracket, factor in CLOSING.values():
        factors |= dict.fromkeys(opened[bracket], factor)
        if opened[bracket]:
            reports.append(Report("not understood", bracket, "the bracket is never closed; it reaches to the end"))
    return factors, closing, reports


def _divide(text: str) -> list[str]:
    """The pieces between BREAKs, without the blanks beside these."""
    first, *others = BREAK.split(text)
    if not others:
        return [first]
    return [first.rstrip(), *(text.strip() for text in others[:-1]), others[-1].lstrip()]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours of equal weight as one span: words are tokenized as they stand, not in pieces."""
    runs = itertools.groupby((span for span in spans if span.text), lambda span: span.weight)
    return [Span("".join(span.text for span in run), weight) for weight, run in runs]


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
