from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_reference import GAINS, randomised, translated

from sdjax.checkpoints.networks import clip as conversion
from sdjax.core.tree import size
from sdjax.models.clip import VARIANTS, CLIPText

# Exact sizes of openai/clip-vit-large-patch14's and OpenCLIP's text towers; SD 2 keeps 23 of ViT-H's 24 layers.
TOTALS = {
    "clip_l": 123_060_480,
    "openclip_h": 352_984_064,
    "openclip_h_sd2": 340_387_840,
    "openclip_bigg": 694_659_840,
}

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
# The end of text (40) is not the highest id, so that the two rules for the pooled state differ; it comes twice, as
# where a prompt is padded with it.
IDS = np.array([[0, 5, 63, 7, 40, 40, 40, 40], [0, 61, 3, 9, 2, 62, 40, 40]], np.int32)


def test_parameter_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS


@pytest.mark.parametrize(
    ("kind", "activation", "eos"),
    [("CLIPTextModel", "quick_gelu", 2), ("CLIPTextModel", "gelu", 40), ("CLIPTextModelWithProjection", "gelu", 40)],
)
def test_all_states_agree_with_transformers_to_1e_4(kind: str, activation: str, eos: int):
    torch_config = transformers.CLIPTextConfig(**SIZES, hidden_act=activation, eos_token_id=eos, projection_dim=12)
    torch_clip = getattr(transformers, kind)(torch_config).eval()
    config = conversion.from_diffusers_config(torch_config.to_dict() | {"architectures": [kind]})
    apply, shapes = jax.jit(CLIPText(config).apply), conversion.shapes(config)
    for gain in GAINS:
        params = translated(randomised(torch_clip, gain), conversion.TABLE, shapes)
        with torch.no_grad():
            expected = torch_clip(torch.from_numpy(IDS), output_hidden_states=True)
        found = apply({"params": params}, IDS)
        pooled = expected.text_embeds if kind.endswith("Projection") else expected.pooler_output
        # transformers' last entry is normalised, ours is not; the next test has it
        assert len(found.hidden) == len(expected.hidden_states) == 4
        for ours, theirs in zip(found.hidden[:-1], expected.hidden_states[:-1], strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4 * gain, rtol=0)
        np.testing.assert_allclose(found.last, expected.last_hidden_state.numpy(), atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.pooled, pooled.numpy(), atol=1e-4, rtol=0)


def test_normalising_the_last_state_gives_the_last_output():
    """`normalise` is the method that SD 2 and clip skip apply to earlier layers."""
    config = conversion.from_diffusers_config(SIZES)
    model = CLIPText(config)
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    scale = jnp.linspace(0.5, 2.0, config.width)
    variables["params"]["final_layer_norm"]["scale"] = scale
    out = jax.jit(model.apply)(variables, IDS)
    x = np.asarray(out.hidden[-1], np.float64)
    by_hand = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(model.apply(variables, out.hidden[-1], method="normalise"), by_hand, atol=1e-4)
    np.testing.assert_allclose(out.last, by_hand, atol=1e-4)
