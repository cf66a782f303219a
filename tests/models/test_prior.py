"""unCLIP's prior beside diffusers' PriorTransformer, float32, and Karlo's total."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import zoo
from diffusers import PriorTransformer as Reference
from torch_reference import GAINS, randomised, translated

from sdjax.checkpoints.layouts.diffusers import read_component, write_component
from sdjax.checkpoints.networks import prior as conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, size
from sdjax.models.conditioning import Cond
from sdjax.models.prior import VARIANTS, PriorConfig, PriorTransformer

SIZES = {"narrow": zoo.PRIOR, "wide": PriorConfig(embedding_dim=48, layers=1, heads=2, head_size=12, tokens=7)}


def reference(config: PriorConfig, gain: float = 1.0) -> Any:
    """Random weights, and a mean and standard deviations that no other test has."""
    theirs: Any = randomised(Reference.from_config(conversion.to_diffusers_config(config)), gain)
    theirs.clip_std.data = theirs.clip_std.data.abs() + 0.5
    return theirs


def inputs(config: PriorConfig) -> tuple[np.ndarray, np.ndarray, Cond]:
    """Two noisy embeddings, timesteps and texts, the first of which ends with pads."""
    rng = np.random.default_rng(0)
    x, vector = rng.standard_normal((2, 2, config.embedding_dim)).astype("f")
    context = rng.standard_normal((2, config.tokens, config.embedding_dim)).astype("f")
    mask = np.arange(config.tokens) < np.array([[3], [config.tokens]])
    return x, np.array([3.0, 871.0], "f"), Cond(context, mask, vector)


def test_parameter_total():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == {"karlo": 1_022_030_080}


@pytest.mark.parametrize("name", SIZES)
def test_embeddings_agree_with_diffusers_to_1e_5(name: str):
    config = SIZES[name]
    x, t, cond = inputs(config)

    @jax.jit
    def forward(params: Any) -> Any:
        module, params = PriorTransformer(config), {"params": params}
        made = module.apply(params, x, t, cond)
        return made, module.apply(params, made, method="denormalise")

    for gain in GAINS:
        theirs = reference(config, gain)
        with torch.no_grad():
            context, mask, vector = (torch.from_numpy(part) for part in (cond.context, cond.mask, cond.vector))
            expected = theirs(torch.from_numpy(x), torch.from_numpy(t), vector, context, mask).predicted_image_embedding
            wanted = expected, theirs.post_process_latents(expected)
        assert expected.std() > 0.5
        made = forward(translated(theirs, conversion.TABLE, conversion.shapes(config)))
        for ours, other in zip(made, wanted, strict=True):
            np.testing.assert_allclose(ours, other, atol=1e-5, rtol=0)


def test_folders_are_read_and_written_as_diffusers_does(tmp_path: Path):
    theirs = reference(zoo.PRIOR)
    theirs.save_pretrained(tmp_path / "theirs")
    found = read_component(tmp_path / "theirs", "prior")
    assert found.config == zoo.PRIOR
    write_component(tmp_path / "ours", "prior", found)
    again, wanted = Reference.from_pretrained(tmp_path / "ours").state_dict(), theirs.state_dict()
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[key], leaf) for key, leaf in wanted.items())
    both = flatten(read_component(tmp_path / "ours", "prior").params), flatten(found.params)
    assert all(np.array_equal(both[0][name], leaf) for name, leaf in both[1].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_in_type": "layer"}, "norm_in_type = 'layer' in prior/config.json.*must be None"),
        ({"added_emb_type": None}, "added_emb_type = None.*'prd'"),
        ({"additional_embeddings": 0}, "additional_embeddings = 0.*must be 4"),
        ({"clip_embed_dim": 48}, "clip_embed_dim = 48.*null or 32"),
        ({"time_embed_dim": 32}, "time_embed_dim = 32.*null or 24"),
        ({"num_embeddings": 10**6}, "num_embeddings = 1000000.*at most 4096"),
    ],
)
def test_other_structures_are_errors_of_one_line(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as error:
        conversion.from_diffusers_config(conversion.to_diffusers_config(zoo.PRIOR) | change)
    assert "\n" not in str(error.value)
