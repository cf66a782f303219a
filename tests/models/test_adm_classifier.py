"""ADM's classifier: its pooling beside PyTorch's, its totals, its keys; the way down is UNet2D's own."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sdjax.checkpoints.mapping import export, read
from sdjax.checkpoints.networks import unet2d as conversion
from sdjax.checkpoints.original_keys import inward
from sdjax.core.tree import flatten, size
from sdjax.models.adm_classifier import VARIANTS, AttentionPool, ClassifierConfig, classifier_of
from sdjax.models.unet2d import UNet2DConfig

TINY = ClassifierConfig(
    UNet2DConfig((32, 64), (1,), (1, 1), layers_per_block=1, scale_shift=True, resblock_updown=True), 16, 10
)


def test_parameter_totals():
    """In millions, as counted from guided-diffusion's code; ADM-G at 256 pixels has 607.9 with its UNet (553.8)."""
    totals = {name: round(size(conversion.classifier_shapes(config)) / 1e6, 1) for name, config in VARIANTS.items()}
    assert totals == {"adm_64": 65.4, "adm_128": 42.6, "adm_256": 54.1, "adm_512": 54.4}


def test_the_pooling_is_guided_diffusions():
    """AttentionPool2d with QKVAttention (guided_diffusion/unet.py), written out in torch: 1e-5."""
    generator = torch.Generator().manual_seed(0)
    c, places, classes, heads = 128, 12, 7, 2
    x = torch.randn(3, c, 3, 4, generator=generator)
    position = torch.randn(c, places + 1, generator=generator)
    qkv, out = torch.nn.Conv1d(c, 3 * c, 1), torch.nn.Conv1d(c, classes, 1)
    with torch.no_grad():
        tokens = x.reshape(3, c, -1)
        tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], -1) + position
        q, k, v = (part.reshape(3 * heads, c // heads, -1) for part in qkv(tokens).chunk(3, dim=1))
        scale = 1 / math.sqrt(math.sqrt(c // heads))
        weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        expected = out(torch.einsum("bts,bcs->bct", weights, v).reshape(3, c, -1))[:, :, 0]
    parts = qkv.weight.detach()[:, :, 0].chunk(3)
    biases = qkv.bias.detach().chunk(3)
    params = {
        f"to_{n}": {"kernel": w.T.numpy(), "bias": b.numpy()} for n, w, b in zip("qkv", parts, biases, strict=True)
    }
    params["to_out"] = {"kernel": out.weight.detach()[:, :, 0].T.numpy(), "bias": out.bias.detach().numpy()}
    params["positional_embedding"] = position.T.numpy()
    found = AttentionPool(classes).apply({"params": params}, x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_file_of_guided_diffusion_is_read():
    """Keys as EncoderUNetModel has them: the UNet's own way down and middle, and the pooling as out.2."""
    rng, shapes = np.random.default_rng(0), conversion.classifier_shapes(TINY)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f"), shapes)
    stored = {key: np.array(value) for key, value in export(conversion.CLASSIFIER_TABLE, params, shapes, "").items()}
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    blocks = {"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0": "input_blocks.2.0"}
    blocks |= {"down_blocks.1.resnets.0": "input_blocks.3.0", "mid_block.resnets.0": "middle_block.0"}
    blocks |= {"mid_block.resnets.1": "middle_block.2"}
    renames = {f"{a}.{x}.": f"{b}.{y}." for a, b in blocks.items() for x, y in inner.items()}
    renames |= {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    renames |= {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0."}
    original = {}
    for here, there in (
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("mid_block.attentions.0", "middle_block.1"),
    ):
        for kind in ("weight", "bias"):
            joint = np.concatenate([stored.pop(f"{here}.to_{n}.{kind}") for n in "qkv"])  # one head: either order
            out = stored.pop(f"{here}.to_out.0.{kind}")
            original[f"{there}.qkv.{kind}"] = joint[:, :, None] if kind == "weight" else joint
            original[f"{there}.proj_out.{kind}"] = out[:, :, None] if kind == "weight" else out
            original[f"{there}.norm.{kind}"] = stored.pop(f"{here}.group_norm.{kind}")
    for kind in ("weight", "bias"):
        joint = np.concatenate([stored.pop(f"out.2.to_{n}.{kind}") for n in "qkv"])
        original[f"out.2.qkv_proj.{kind}"] = joint[:, :, None] if kind == "weight" else joint
        out = stored.pop(f"out.2.c_proj.{kind}")
        original[f"out.2.c_proj.{kind}"] = out[:, :, None] if kind == "weight" else out
    for key, value in stored.items():
        old = next((old for old in renames if key.startswith(old)), "")
        original[renames.get(old, "") + key.removeprefix(old)] = value
    assert "out.2.positional_embedding" in original
    pieces = conversion.classifier_pieces(TINY)
    assert {piece.key for piece in pieces.values()} == set(original)
    found = flatten(read(conversion.CLASSIFIER_TABLE, inward(pieces, original), shapes, np.float32, ""))
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_its_gradient_reaches_the_picture():
    """What guidance asks for: d log p(class | x, t) / dx, by finite differences along a random direction."""
    model, rng = classifier_of(TINY), np.random.default_rng(0)
    shapes = conversion.classifier_shapes(TINY)
    params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype("f"), shapes)
    x, along = (rng.standard_normal((2, 16, 16, 3)).astype("f") for _ in range(2))

    @jax.jit
    def log_p(x):
        return jax.nn.log_softmax(model.apply({"params": params}, x, jnp.array([10.0, 700.0])))[:, 3].sum()

    slope = (log_p(x + 1e-2 * along) - log_p(x - 1e-2 * along)) / 2e-2
    assert abs(float(slope)) > 1e-3
    np.testing.assert_allclose((jax.grad(log_p)(x) * along).sum(), slope, rtol=1e-2)
