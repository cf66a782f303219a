"""Prompts of other programs in this one's syntax: the same words, with the weights that they have there."""

from __future__ import annotations

import re

BRACKET = re.compile(r"\\.|[\[\]]", re.DOTALL)
# A brace that would begin a choice here.
OPENED = re.compile(r"(?<!\\)\{")
# A1111 alone reads these words as commands; text encoders know no capitals.
COMMAND = re.compile(r"\b(AND|BREAK)\b")
# NovelAI: {word} weighs 1.05, [word] 1 / 1.05; parentheses are characters. Since version 4, 1.5::words:: weighs 1.5.
NOVELAI = {"{": "(", "}": ":1.05)", "[": "(", "]": f":{1 / 1.05:.4f})", "(": r"\(", ")": r"\)"}
NUMERIC = re.compile(r"(?<![\d.])(-?\d{1,3}(?:\.\d{1,6})?)::([^:]*)::")
# InvokeAI's compel: (words)1.2, (words)++, word++ and word--, where each mark multiplies; brackets are characters.
COMPEL = re.compile(
    r"\\.|[\[\]]|\((?!\))|\)(?P<group>\++|-+|\d*\.?\d+)?"
    r"|(?<![^\s(),.])(?P<word>[^\s(),.\[\]\\+-]++)(?P<marks>\++|-+)(?=[\s(),.]|$)",
    re.DOTALL,
)
UP, DOWN = 1.1, 0.9


def sdjax(text: str) -> str:
    """This program's syntax."""
    return text


def a1111(text: str) -> str:
    """A1111's, which knows no choices in braces: what drew words has put them into the text."""
    return OPENED.sub(r"\{", text) if "|" in text or "$$" in text else text


def comfyui(text: str) -> str:
    """ComfyUI's: brackets are characters (comfy/sd1_clip.py)."""
    return BRACKET.sub(lambda match: match[0] if len(match[0]) > 1 else f"\\{match[0]}", a1111(_words(text)))


def novelai(text: str) -> str:
    """NovelAI's: braces, brackets and numbers weigh words."""
    text = "".join(NOVELAI.get(character, character) for character in _words(text))
    return NUMERIC.sub(r"(\2:\1)", text)


def invokeai(text: str) -> str:
    """InvokeAI's, that of damian0815/compel; its blends and conjunctions are words here."""

    def translate(match: re.Match[str]) -> str:
        if match["word"]:
            return f"({match['word']}:{_weight(match['marks'])})"
        if match[0][0] == ")":
            return f":{_weight(match['group'])})"
        return f"\\{match[0]}" if match[0] in "[]" else match[0]

    return COMPEL.sub(translate, a1111(_words(text)))


def _words(text: str) -> str:
    """A text without A1111's commands."""
    return COMMAND.sub(lambda match: match[0].lower(), text)


def _weight(marks: str | None) -> str:
    """The number of marks, each of which multiplies; 1 of none."""
    if marks and marks[0] not in "+-":
        return marks
    return f"{(DOWN if marks and marks[0] == '-' else UP) ** len(marks or ''):.4g}"
