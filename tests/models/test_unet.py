from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from published import UNETS
from test_unet_configs import CIRCULATING
from torch_reference import GAINS, channels_first, channels_last, randomised, translated

from sdjax.checkpoints.networks import unet as conversion
from sdjax.core.tree import size
from sdjax.models.conditioning import Cond
from sdjax.models.unet import VARIANTS, UNet, UNetConfig

# Exact sizes of CompVis/latent-diffusion's UNets; Stable Diffusion's are with their keys in tests/checkpoints.
TOTALS = {
    "ldm_cin_f4": 400_920_579,
    "ldm_cin_f8": 394_984_196,
    "ldm_text_f4": 403_623_939,
    "ldm_text": 872_300_484,
    "ldm_layout": 246_277_379,
    "ldm_rdm": 1_335_480_400,
}

BLOCK = {False: ("DownBlock2D", "UpBlock2D"), True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")}


def reference(crossed: tuple[bool, ...], gain: float, **config: Any) -> UNet2DConditionModel:
    return randomised(
        UNet2DConditionModel(
            down_block_types=tuple(BLOCK[here][0] for here in crossed),
            up_block_types=tuple(BLOCK[here][1] for here in reversed(crossed)),
            norm_num_groups=8,
            **config,
        ),
        gain,
    )


SHAPES = {
    "sd1": {
        "crossed": (True, False),
        "block_out_channels": (32, 64),
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "in_channels": 5,
    },
    "sd2": {
        "crossed": (True, False),
        "block_out_channels": (32, 64),
        "attention_head_dim": (2, 8),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "use_linear_projection": True,
    },
    "sdxl": {
        "crossed": (False, True, True),
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 24,
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "layers_per_block": 1,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 20,
    },
    "refiner": {
        "crossed": (False, True, True, False),
        "block_out_channels": (16, 16, 32, 32),
        "attention_head_dim": (1, 2, 4, 8),
        "cross_attention_dim": 24,
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "layers_per_block": 1,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 5 * 256 + 20,
    },
    "x4_upscaler": {
        "crossed": (False, True, True),
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "in_channels": 7,
        "num_class_embeds": 50,
        "only_cross_attention": (True, True, False),
    },
    "lcm": {
        "crossed": (True, False),
        "block_out_channels": (32, 64),
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "time_cond_proj_dim": 12,
    },
    "all attend to the context": {
        "crossed": (True, True),
        "block_out_channels": (16, 32),
        "attention_head_dim": (2, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "only_cross_attention": True,
        "mid_block_only_cross_attention": True,
        "upcast_attention": True,
    },
}


class Case(NamedTuple):
    """One batch for a network, and what torch makes of it."""

    config: UNetConfig
    params: dict[str, Any]
    x: np.ndarray
    t: np.ndarray
    cond: Cond
    expected: np.ndarray


def case(name: str, gain: float = 1.0) -> Case:
    torch_unet = reference(gain=gain, **SHAPES[name])
    config = conversion.from_diffusers_config(torch_unet.config)
    rng = np.random.default_rng(1)
    # Sides that are odd on the way down: 15, 8, 4 and 22, 11, 6. Upsampling must follow the skip connections.
    sides = (15, 22) if name == "sdxl" else (16, 24)
    x = rng.standard_normal((2, *sides, config.in_channels), np.float32)
    t = np.array([981.0, 3.5], np.float32)
    context = rng.standard_normal((2, 7, config.context_dim), np.float32)
    added, vector = {}, None
    if config.vector_dim is not None:
        text = rng.standard_normal((2, 20), np.float32)
        ids = rng.integers(0, 1024, (2, (config.vector_dim - 20) // 256)).astype(np.float32)
        added = {"added_cond_kwargs": {"text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(ids)}}
        sinusoids = torch_unet.add_time_proj(torch.from_numpy(ids).flatten()).numpy()
        vector = np.concatenate([text, sinusoids.reshape(2, -1)], axis=1)
    label = None if config.classes is None else np.array([20, config.classes - 1])
    guidance = None
    if config.guidance_dim is not None:
        guidance = rng.standard_normal((2, config.guidance_dim), np.float32)
        added["timestep_cond"] = torch.from_numpy(guidance)
    if label is not None:
        added["class_labels"] = torch.from_numpy(label)
    with torch.no_grad():
        out = torch_unet(channels_first(x), torch.from_numpy(t), torch.from_numpy(context), **added).sample
    params = translated(torch_unet, conversion.table(config), conversion.shapes(config))
    return Case(config, params, x, t, Cond(context, vector=vector, label=label, guidance=guidance), channels_last(out))


def test_parameter_totals():
    assert {name: size(conversion.shapes(VARIANTS[name])) for name in TOTALS} == TOTALS
    assert VARIANTS.keys() - TOTALS.keys() == {*UNETS, *CIRCULATING}


@pytest.mark.parametrize("name", SHAPES)
def test_output_agrees_with_diffusers_to_1e_4(name: str):
    apply = None
    for c in (case(name, gain) for gain in GAINS):
        apply = apply or jax.jit(UNet(c.config).apply)
        assert np.abs(c.expected).std() > 0.1
        np.testing.assert_allclose(apply({"params": c.params}, c.x, c.t, c.cond), c.expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd1", "x4_upscaler"])
def test_concat_and_mask_mean_what_they_say(name: str):
    """Channels given as `concat` are channels of the input; masked tokens might as well be absent."""
    c = case(name)
    context = c.cond.context
    padded = np.concatenate([context, np.full((2, 3, context.shape[-1]), 9.0, np.float32)], axis=1)
    cond = c.cond._replace(context=padded, mask=np.arange(10)[None] < np.array([7, 7])[:, None], concat=c.x[..., 4:])
    out = jax.jit(UNet(c.config).apply)({"params": c.params}, c.x[..., :4], c.t, cond)
    np.testing.assert_allclose(out, c.expected, atol=1e-4, rtol=0)


def _residuals(loss, params) -> int:
    """The elements that the backward pass is given, parameters aside."""
    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    kept = jax.tree.leaves(backward)
    return sum(leaf.size for leaf in kept) - sum(leaf.size for leaf in jax.tree.leaves(params))


REMAT = UNetConfig((16,), (1,), 3, (2,), 6, layers_per_block=1, groups=4)
X, CONTEXT = (np.random.default_rng(i).standard_normal(s, np.float32) for i, s in enumerate([(1, 8, 8, 4), (1, 3, 6)]))


@pytest.fixture(scope="module")
def params():
    """Of `REMAT`, of a size at which nothing vanishes."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.size / leaf.shape[-1]),
        conversion.shapes(REMAT),
    )


def loss_and_output(params: dict, remat: str) -> tuple[jax.Array, jax.Array]:
    out = UNet(REMAT, remat=remat).apply({"params": params}, X, np.float32([5.0]), Cond(context=CONTEXT))
    return jnp.square(out).mean(), out


gradient = jax.jit(jax.value_and_grad(loss_and_output, has_aux=True), static_argnums=1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["products", "blocks", "scanned"])
def test_remat_changes_no_output_or_gradient(policy: str, params):
    (_, plain), plain_gradient = gradient(params, "none")
    (_, recomputed), found = gradient(params, policy)
    np.testing.assert_allclose(recomputed, plain, atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), found, plain_gradient)


def test_remat_keeps_less(params):
    traced = [jax.make_jaxpr(lambda p, r=remat: loss_and_output(p, r))(params).eqns for remat in ("none", "blocks")]
    recomputed_blocks = [sum("prevent_cse" in equation.params for equation in equations) for equations in traced]
    assert recomputed_blocks == [0, 11], "five residual and six transformer blocks are recomputed"
    kept = [_residuals(lambda p, r=remat: loss_and_output(p, r)[0], params) for remat in ("blocks", "products", "none")]
    assert kept == sorted(kept), "each policy keeps more than the one before it"
    assert kept[0] < 0.7 * kept[1] < 0.7 * 0.7 * kept[2]
    program = str(jax.make_jaxpr(lambda p: loss_and_output(p, "scanned"))(params))
    assert program.count(" length=3\n") == 1, "a loop for a transformer"


def test_bfloat16_is_near(params):
    """It has 8 bits: an error, and a small one."""
    plain, half = (
        jax.jit(UNet(REMAT, dtype=dtype).apply)({"params": params}, X, np.float32([5.0]), Cond(context=CONTEXT))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32
    error = np.sqrt(np.square(half - plain).mean()) / plain.std()
    assert 1e-4 < error < 0.03
