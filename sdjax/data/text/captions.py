"""Captions as DeepFloyd IF was trained on them: in lower case, without what captions of the web have beside words.

The rules are those of deep-floyd/IF, deepfloyd_if/modules/t5.py, which diffusers' pipelines have, too.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from html.parser import HTMLParser
from urllib.parse import unquote_plus

Rule = tuple[re.Pattern[str], str]

DOMAINS = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FORMATS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    r"\ufe63\uff0d"
)


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{DOMAINS})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{DOMAINS})", ""),
)
SIGNS = _rules(
    (r"@[\w\d]+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters, and signs near them
    (f"[{DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # internet addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FORMATS})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
HYPHENS, MOST_HYPHENS = re.compile("[-_]"), 3
PHRASES = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of goods: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FORMATS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
MOST_CHARACTERS = 4000
CDATA = "cdata["
WIDE = re.compile("[\ufb00-\ufb06\uff01-\uffee\u3000]")  # ligatures, and letters as wide or narrow as Chinese ones
LETTERS = _rules(("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]", ""), ("[\u02bc\u201a\u201b]", "'"), ("[\u201e\u201f]", '"'))


def read_caption(caption: str) -> str:
    """A caption as IF's text encoder reads it.

    It is cleaned twice, as diffusers does by default; what the first time uncovers is then cleaned, too. What follows
    `MOST_CHARACTERS` is not read: no text encoder has as many tokens, and the rules take time for a long word.
    """
    return clean_caption(clean_caption(caption[:MOST_CHARACTERS]))


def clean_caption(caption: str) -> str:
    """The caption in lower case without links, markup, file names, numbers of goods, or needless punctuation.

    Of what diffusers lets ftfy repair, letters of unusual width and ligatures are; a text decoded wrongly is not.
    """
    text = _without_markup(_replaced(unquote_plus(caption).strip().lower(), LINKS))
    text = _replaced(text, SIGNS)
    if len(HYPHENS.findall(text)) > MOST_HYPHENS:
        text = HYPHENS.sub(" ", text)
    text = html.unescape(html.unescape(_usual_letters(text)))
    return _replaced(text, PHRASES).strip()


def _replaced(text: str, rules: Iterable[Rule]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _usual_letters(text: str) -> str:
    text = WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), _replaced(text, LETTERS))
    return unicodedata.normalize("NFC", text)


def _without_markup(text: str) -> str:
    """The text of HTML."""
    reader = _TextOfHTML()
    try:
        reader.feed(text)
        reader.close()
    except AssertionError:  # the parser's, of a declaration that does not end
        return text
    return "".join(reader.pieces)


class _TextOfHTML(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:  # within no script or style
            self.pieces.append(data)

    def unknown_decl(self, data: str) -> None:
        if data.startswith(CDATA):
            self.pieces.append(data.removeprefix(CDATA))
