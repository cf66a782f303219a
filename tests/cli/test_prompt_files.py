"""Prompt files: prompts as they stand, flags of their own, and mistakes with their line."""

from __future__ import annotations

import pytest

from sdjax.cli.prompt_files import parse_line, read_prompt_file
from sdjax.core.errors import UserError

FILE = """\ufeff# all of these
a red heart --negative_prompt blue --seed 3 --steps 20 --width 512

  an artist's "beret", (red:1.2) -- with dashes --and-- # no comment\r
   # a comment
flag: 旗 --guidance_scale=7.5 --sampler dpmpp_2m --schedule=karras
--prompt "a dog, don't ask" --negative-prompt 'x --y' --num_images 2
a cat --n ugly, bad thing --w 512 --h 768 --d 1 --l 5 --s 28
a map --init_image "my files/x.png" --mask=m.png --strength 0.5 --cfg_scale 3
"""


def test_a_file(tmp_path):
    (tmp_path / "p.txt").write_bytes(FILE.replace(" --and--", "").encode())
    assert [tuple(line) for line in read_prompt_file(tmp_path / "p.txt")] == [
        ("a red heart", {"negative_prompt": "blue", "seed": 3, "steps": 20, "width": 512}),
        ('an artist\'s "beret", (red:1.2) -- with dashes # no comment', {}),
        ("flag: 旗", {"guidance_scale": 7.5, "sampler": "dpmpp_2m", "schedule": "karras"}),
        ("a dog, don't ask", {"negative_prompt": "x --y", "num_images": 2}),
        (
            "a cat",
            {
                **{"negative_prompt": "ugly, bad thing", "width": 512, "height": 768},
                **{"seed": 1, "guidance_scale": 5.0, "steps": 28},
            },
        ),
        ("a map", {"init_image": "my files/x.png", "mask": "m.png", "strength": 0.5, "guidance_scale": 3.0}),
    ]


BAD = {
    "a cat --guidance 3": r"unknown flag '--guidance' in p\.txt line 4; choose one of: .*--guidance_scale.*--width",
    "a cat --steps many": r"steps 'many' in p\.txt line 4, --steps: choose an integer of at least 1",
    "a cat --s 0": r"steps 0 in p\.txt line 4, --s: choose an integer",
    "a cat --strength 1.5": r"strength 1\.5 in p\.txt line 4, --strength: choose a number of 0 to 1",
    "a cat --sampler nope": r"unknown sampler 'nope' in p\.txt line 4, --sampler; choose one of: .*euler",
    "a cat --seed": r"--seed in p\.txt line 4 has no value",
    "a cat --seed --steps 3": r"--seed in p\.txt line 4 has no value",
    "a cat --seed 1 --d 2": r"--d in p\.txt line 4 is there already",
    "a cat --prompt dog": r"--prompt in p\.txt line 4: the line begins with another prompt, 'a cat'",
    "a cat --negative_prompt it's": r"p\.txt line 4: No closing quotation.*double quotes",
}


@pytest.mark.parametrize("line", BAD)
def test_mistakes_name_the_file_the_line_and_the_flag(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.txt"
    path.write_text(f"# first\n\na dog --steps 3\n{line}\n")
    with pytest.raises(UserError, match=BAD[line]) as error:
        read_prompt_file(path.relative_to(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"cannot read --from_file .*p\.txt: No such file"),
        (b"\n # only this\n", "holds no prompt: write one a line"),
        (b"\x89PNG\xff", "it is not UTF-8 text"),
        (b"a\n" * 2**23 + b"a", "larger than 16777216 bytes"),
    ],
)
def test_files_that_cannot_be_read(data, message, tmp_path):
    if data is not None:
        (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_prompt_file(tmp_path / "p.txt")


@pytest.mark.parametrize("line", ["--seed 3", "--prompt '' --seed 3"])
def test_a_line_may_have_settings_alone(line):
    """For models that take no prompt."""
    assert parse_line(line, "") == (None, {"seed": 3})


def test_a_line_of_dashes_is_a_prompt():
    assert parse_line("-- a -b --3 c", "") == ("-- a -b --3 c", {})
