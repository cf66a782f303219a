"""T5's encoder beside transformers', every state, float32."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_reference import randomised, translated
from transformers.models.t5.modeling_t5 import T5Attention

from sdjax.checkpoints.networks import t5 as conversion
from sdjax.core.tree import size
from sdjax.models.t5 import VARIANTS, T5Config, T5Encoder, relative_buckets

# google-research/t5x, examples/t5; and of the checkpoints of transformers.
TOTALS = {
    "t5_small": 35_330_816,
    "t5_base": 109_628_544,
    "t5_large": 334_939_648,
    "t5_3b": 1_240_909_824,
    "t5_11b": 4_864_791_552,
    "t5_v1_1_small": 35_332_800,
    "t5_v1_1_base": 109_628_544,
    "t5_v1_1_large": 341_231_104,
    "t5_v1_1_xl": 1_223_527_424,
    "t5_v1_1_xxl": 4_762_310_656,
}
SIZES = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
KINDS = {
    "gated": SIZES | {"feed_forward_proj": "gated-gelu"},
    "original": SIZES | {"feed_forward_proj": "relu"},
    "narrow": SIZES | {"feed_forward_proj": "gated-gelu", "num_heads": 3},  # 3 heads of 8 beside a width of 32
}
GOLDEN = {
    **{0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -23: 11, -32: 12, -46: 13, -64: 14, -91: 15, -255: 15},
    **{1: 17, 7: 23, 8: 24, 16: 26, 32: 28, 64: 30, 90: 30, 91: 31, 255: 31},
}
ENDS = {"alone": (1,), "padded": (11, 5), "long": (128, 100), "empty": (1, 11)}
"""Tokens of each text of a batch, its end included."""
LENGTHS = {"alone": 1, "padded": 77, "long": 128, "empty": 77}


def reference(sizes: dict) -> Any:
    """Random weights; scores are not scaled, so queries are as much smaller as they are after T5's own training."""
    config = transformers.T5Config(**sizes)
    model: Any = randomised(transformers.T5EncoderModel._from_config(config, attn_implementation="eager"))
    for block in model.encoder.block:
        block.layer[0].SelfAttention.q.weight.data *= config.d_kv**-0.5
    return model


def tokens(ends: tuple[int, ...], length: int) -> np.ndarray:
    """Ids of random texts, each with its end of text, then pads."""
    ids = np.random.default_rng(length).integers(3, 1103, (len(ends), length))
    for row, end in zip(ids, ends, strict=True):
        row[end - 1], row[end:] = 1, 0
    return ids


def test_parameter_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS
    assert size(conversion.shapes(T5Config(2048, 128, 4, 4, 32, 256))) == 918_784


def test_buckets_of_distances():
    """At 16, 32 and 64 the logarithm is a whole number, at 91 the last bucket begins."""
    found = relative_buckets(256)
    assert {key: int(found[max(-key, 0), max(key, 0)]) for key in GOLDEN} == GOLDEN
    place = torch.arange(256)
    theirs = T5Attention._relative_position_bucket(place[None] - place[:, None])
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_states_agree_with_transformers_to_1e_5(kind: str):
    theirs = reference(KINDS[kind])
    sizes = conversion.from_diffusers_config(theirs.config.to_dict())
    params = {"params": translated(theirs, conversion.TABLE, conversion.shapes(sizes))}
    apply = jax.jit(T5Encoder(sizes).apply)
    for name, ends in ENDS.items():
        ids = tokens(ends, LENGTHS[name])
        for mask in (ids != 0, None):
            with torch.no_grad():
                given = None if mask is None else torch.from_numpy(mask).long()
                expected = theirs(torch.from_numpy(ids), attention_mask=given).last_hidden_state
            assert expected.std() > 0.5
            np.testing.assert_allclose(apply(params, ids, mask), expected, atol=1e-5, rtol=0, err_msg=name)
