"""Tags of LoRA in prompts, as A1111 and the extension of block weights read them."""

from __future__ import annotations

import pytest

from sdjax.core.errors import UserError
from sdjax.data.text.lora_tags import LoraTag, read_tags

TAGS = {
    "<lora:a>": LoraTag("a", 1.0, 1.0),
    "<lora:a:0.8>": LoraTag("a", 0.8, 0.8),
    "<lora:a:0.8:0.5>": LoraTag("a", 0.8, 0.5),
    "<lora:a:te=0:unet=1>": LoraTag("a", 0.0, 1.0),
    "<lora:a:unet=0.5>": LoraTag("a", 1.0, 0.5),
    "<lora:a b-1.0_x:-1>": LoraTag("a b-1.0_x", -1.0, -1.0),
    "<lyco:a:.5:lbw=1,0,0.5:start=2:stop=9>": LoraTag("a", 0.5, 0.5, "1,0,0.5", 2, 9),
    "<lora:a:1:lbw=ALL>": LoraTag("a", 1.0, 1.0, "ALL"),
}


@pytest.mark.parametrize("tag", TAGS)
def test_tags(tag):
    assert read_tags(f"a {tag}cat") == ("a cat", [TAGS[tag]])


def test_other_tags_stay():
    assert read_tags("<hypernet:a:1> <lora:b> (x:1.2) 1 < 2") == ("<hypernet:a:1>  (x:1.2) 1 < 2", [LoraTag("b")])


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora:a:x>", "te 'x' in <lora:a:x>: choose a number"),
        ("<lora:a:1:nan>", "unet 'nan'"),
        ("<lora:a:1:2:3>", "'3' in <lora:a:1:2:3> is one number too many"),
        ("<lora:a:dyn=4>", "unknown argument 'dyn' in <lora:a:dyn=4>; choose one of: lbw, start, stop, te, unet"),
    ],
)
def test_faults(tag, message):
    with pytest.raises(UserError, match=message):
        read_tags(tag)
