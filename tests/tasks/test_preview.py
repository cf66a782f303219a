"""Prompts of the images that a run shows while it trains."""

from __future__ import annotations

from configs import openmoji
from sdjax.tasks.preview import preview_prompts


def test_prompts_are_captions_of_the_data_unless_the_config_names_some(pictures, caplog):
    """Of 24 images every sixth one's, none of them twice, whatever data the config is for; the log names the key."""
    config = openmoji.get_config()
    config.data.source = f"folder:{pictures}"
    with caplog.at_level("INFO", "sdjax"):
        found = preview_prompts(config)
    assert found == tuple(f"an image of the number {i}" for i in (0, 6, 12, 18))
    said = f"samples while training: {', '.join(map(repr, found))}; --config.sample.prompts changes them"
    assert caplog.messages[-1] == said
    config.sample.columns = 30
    assert len(set(preview_prompts(config))) == 24
    config.sample.prompts = ("a cat",)
    assert preview_prompts(config) == ("a cat",)
