"""Prompts of training images without captions: one text for all, or the published templates of textual inversion.

The templates are those of rinongal/textual_inversion, ldm/data/personalized.py, in the selection of diffusers'
examples/textual_inversion.
"""

from __future__ import annotations

WORD = "{}"
_OBJECT = """
a photo of a {}
a rendering of a {}
a cropped photo of the {}
the photo of a {}
a photo of a clean {}
a photo of a dirty {}
a dark photo of the {}
a photo of my {}
a photo of the cool {}
a close-up photo of a {}
a bright photo of the {}
a cropped photo of a {}
a photo of the {}
a good photo of the {}
a photo of one {}
a close-up photo of the {}
a rendition of the {}
a photo of the clean {}
a rendition of a {}
a photo of a nice {}
a good photo of a {}
a photo of the nice {}
a photo of the small {}
a photo of the weird {}
a photo of the large {}
a photo of a cool {}
a photo of a small {}
"""
_STYLE = """
a painting in the style of {}
a rendering in the style of {}
a cropped painting in the style of {}
the painting in the style of {}
a clean painting in the style of {}
a dirty painting in the style of {}
a dark painting in the style of {}
a picture in the style of {}
a cool painting in the style of {}
a close-up painting in the style of {}
a bright painting in the style of {}
a cropped painting in the style of {}
a good painting in the style of {}
a close-up painting in the style of {}
a rendition in the style of {}
a nice painting in the style of {}
a small painting in the style of {}
a weird painting in the style of {}
a large painting in the style of {}
"""
TEMPLATES = {"object": tuple(_OBJECT.strip().splitlines()), "style": tuple(_STYLE.strip().splitlines())}


def prompts_of(text: str, word: str) -> tuple[str, ...]:
    """The prompts of every image: those of a key of `TEMPLATES`, or the text itself; {} in them stands for the word."""
    return tuple(prompt.replace(WORD, word) for prompt in TEMPLATES.get(text, (text,)))
