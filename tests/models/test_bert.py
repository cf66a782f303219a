"""LDM's text encoder beside diffusers', and from the original's keys."""

from __future__ import annotations

import jax
import numpy as np
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from original_names import bert_original
from torch_reference import randomised, translated

from sdjax.checkpoints.mapping import export, read
from sdjax.checkpoints.networks import embedders as conversion
from sdjax.checkpoints.original_keys import inward
from sdjax.core.tree import flatten, size
from sdjax.models.bert import VARIANTS, Bert

SIZES = {"vocab_size": 50, "max_position_embeddings": 12, "encoder_layers": 3, "encoder_ffn_dim": 128, "d_model": 32}


def test_parameter_totals():
    """Beside the unused logits: of the text model 1280 x 30522 + 30522, of the layout's 512 x 8192 + 8192."""
    totals = {name: size(conversion.bert_shapes(config)) for name, config in VARIANTS.items()}
    assert totals["ldm_text"] == 542_895_360
    assert totals["ldm_text"] + 1280 * 30522 + 30522 == 581_994_042
    assert round((totals["ldm_layout"] + 512 * 8192 + 8192) / 1e6, 2) == 58.86


def test_states_agree_with_diffusers_to_1e_4():
    config = LDMBertConfig(**SIZES, encoder_attention_heads=4, head_dim=6)
    theirs = randomised(LDMBertModel(config))
    sizes = conversion.bert_from_config({**config.to_dict(), "model_type": "ldmbert"})
    params = translated(theirs, conversion.BERT_TABLE, conversion.bert_shapes(sizes))
    ids = np.random.default_rng(0).integers(0, 50, (3, 12))
    ids[:, 7:] = 0  # padding is attended to
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).last_hidden_state
    found = jax.jit(lambda ids: Bert(sizes).apply({"params": params}, ids))(ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert conversion.bert_from_config(conversion.bert_to_config(sizes)) == sizes


def test_original_keys_become_diffusers():
    """x-transformers' names, in the order in which its Encoder makes its layers."""
    sizes = conversion.bert_from_config(SIZES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f"), conversion.bert_shapes(sizes))
    stored = export(conversion.BERT_TABLE, params, conversion.bert_shapes(sizes), "")
    original, pieces = bert_original(stored, 3), conversion.bert_pieces(sizes)
    assert {piece.key for piece in pieces.values()} == set(original) - {"to_logits.weight", "to_logits.bias"}
    found = read(conversion.BERT_TABLE, inward(pieces, original), conversion.bert_shapes(sizes), np.float32, "")
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found)[name], leaf, err_msg=name)
