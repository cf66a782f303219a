"""Captions as diffusers' pipelines of DeepFloyd IF clean them, written to tests/data/cleaned_captions.json.

pip install ftfy beautifulsoup4
PYTHONPATH=. python tests/reference/cleaned_captions.py
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import IFPipeline

OUT = Path(__file__).parents[1] / "data/cleaned_captions.json"
CAPTIONS = [
    "",
    "   ",
    "A Photo of a Corgi wearing a RED Bow tie.",
    "An astronaut riding a horse, 4k, in the style of <person>",
    "see https://example.com/a/b?c=d and www.example.co.uk/cats or example.org, mail me@example.com",
    "http://x",
    "www:/page of cats",
    "<b>bold</b> text &amp; <a href='http://x.com/y'>link</a><br/>new &lt;line&gt; <!-- gone --> a < b > c",
    "<script>var a = 1;</script>cat<style>p {}</style> dog",
    "unclosed <b attribute='1 cat",
    "@nick_name9 says \u4f60\u597d \u3231 \u6f22\u5b57 hello",
    "em\u2014dash en\u2013dash \u2212minus \u301cwave \uff0dwide",
    "\u00ab quotes \u00bb \u201cdouble\u201d \u2018single\u2019 `grave` \u00b4acute \u201elow\u201c",
    "&quot;quoted&quot; &quot open &amp and &amp;amp; twice &eacute;t&eacute; &#233; &#x41;bc",
    "ip 192.168.0.1 at 9:30   ",
    "line\\nbreak and line\nbreak\ttab",
    "#1 item #12345 and #1234 with 1234567 numbers",
    "file my-cat.png and folder/dog.jpeg.mp4 (c) \u00a9 \u2122 \u00ae",
    '***AUSVERKAUFT*** """sale""" ....end ... dots . alone',
    "this-is-my-cute-cat",
    "this_is-my cat",
    "jc6640 jc6640vc 6640vc231 a1b2c3 ab12 j2d1a2a",
    "Free Shipping worldwide free shipping, free download free, click for more click on this",
    "png image of a dog, jpg images, page 12 of eps",
    "size 10x20 and 3.5\u04454.5 and 7\u00d78 cm",
    "title : subtitle ,word.next/other 3.14",
    '"outer quotes"',
    "'outer quotes'",
    "-leading, and trailing-",
    ":;both;:+",
    ".hidden",
    "%20url%20encoded+plus%2Fslash %e4%bd",
    "100% sure, 50%25",
    "\ufb01re \ufb03ce \uff28\uff45\uff4c\uff4c\uff4f \u3000wide\u00a0nbsp",
    "e\u0301clair n\u0303andu \u212b",
    "emoji \U0001f469\U0001f3fd\u200d\U0001f52c \u2764\ufe0f zero\u200bwidth \ufeffbom",
    "control\x00\x07 characters\x7f",
    "\u0130stanbul STRASSE \u1e9e",
    "[tags] {braces} (parens) | pipes / slashes \\ back ~ tilde * star",
    "a,b.c/d",
    "3 < 4 & 5 > 2",
    "&#60;b&#62;entities&#60;/b&#62;",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "what? yes! \u00bfque? \u00a1ole! \u00bd cup \u00a71 2\u00ba",
    "<![CDATA[data]]> <?php echo ?> <!DOCTYPE html> after",
]


def main() -> None:
    pipe = IFPipeline.__new__(IFPipeline)
    rows = [[caption, pipe._text_preprocessing(caption, clean_caption=True)[0]] for caption in CAPTIONS]
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
