"""The Efficient U-Net, of which there are no published weights or code, beside its figures written in PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch_reference import drawn

from sdjax.core.tree import size
from sdjax.models import added_kv_unet
from sdjax.models.conditioning import Cond
from sdjax.models.efficient_unet import VARIANTS, EfficientUNet, EfficientUNetConfig
from sdjax.plan.flops import count

TINY = EfficientUNetConfig(
    channels=(32, 64),
    layers=(1, 2),
    first=32,
    self_attention=(1,),
    text_attention=(1,),
    heads=2,
    head_width=8,
    text_dim=24,
    cross_dim=16,
    pool_heads=2,
    groups=8,
)
TOTALS = {"imagen_sr256": 487_087_491, "imagen_sr1024": 482_887_043}


class Assembly:
    """Figures A.28 to A.30 of the paper in PyTorch's functions, over the parameters of the module."""

    def __init__(self, params: Any, config: EfficientUNetConfig) -> None:
        self.params, self.config = params, config

    def weights(self, *names: str) -> dict[str, torch.Tensor]:
        found = self.params
        for name in names:
            found = found[name]
        return {name: torch.tensor(np.asarray(x)) for name, x in found.items() if not isinstance(x, dict)}

    def linear(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        own = self.weights(*names)
        return F.linear(x, own["kernel"].T, own.get("bias"))

    def conv(self, x: torch.Tensor, *names: str, stride: int = 1) -> torch.Tensor:
        own = self.weights(*names)
        kernel = own["kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, own["bias"], stride, kernel.shape[-1] // 2)

    def norm(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        own = self.weights(*names)
        return F.group_norm(x, self.config.groups, own["scale"], own["bias"], 1e-5)

    def layer_norm(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        own = self.weights(*names)
        return F.layer_norm(x, x.shape[-1:], own["scale"], own["bias"], 1e-5)

    def attend(self, heads: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        weights = (parts[0] @ parts[1].transpose(-1, -2) / parts[0].shape[-1] ** 0.5).softmax(-1)
        return (weights @ parts[2]).transpose(1, 2).flatten(2)

    def embedding(self, name: str, values: torch.Tensor) -> torch.Tensor:
        half = self.config.first // 2
        angles = values[:, None] * torch.exp(-np.log(10000.0) * torch.arange(half) / half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear(F.silu(self.linear(sinusoids, name, "linear_1")), name, "linear_2")

    def pooled(self, text: torch.Tensor) -> torch.Tensor:
        text = self.layer_norm(text, "add_embedding", "norm1")
        mean = text.mean(1, keepdim=True) + self.weights("add_embedding")["positional_embedding"]
        tokens = torch.cat([mean, text], 1)
        q = self.linear(mean, "add_embedding", "q_proj")
        k, v = (self.linear(tokens, "add_embedding", name) for name in ("k_proj", "v_proj"))
        out = self.attend(self.config.pool_heads, q, k, v)[:, 0]
        return self.layer_norm(self.linear(out, "add_embedding", "proj"), "add_embedding", "norm2")

    def block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self.conv(F.silu(self.norm(x, name, "norm1")), name, "conv1")
        h = self.conv(F.silu(self.norm(h, name, "norm2")), name, "conv2")
        return self.conv(x, name, "conv_shortcut") + h

    def attention(self, x: torch.Tensor, name: str, text: torch.Tensor | None) -> torch.Tensor:
        tokens = self.norm(x, name, "group_norm").flatten(2).transpose(1, 2)
        source = tokens if text is None else text
        q = self.linear(tokens, name, "attention", "to_q")
        k, v = (self.linear(source, name, "attention", each) for each in ("to_k", "to_v"))
        out = self.linear(self.attend(self.config.heads, q, k, v), name, "attention", "to_out")
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])

    def blocks(self, x: torch.Tensor, place: str, level: int, temb: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.linear(F.silu(temb), f"{place}_{level}_emb_proj")[:, :, None, None]
        for i in range(self.config.layers[level]):
            x = self.block(x, f"{place}_{level}_resnets_{i}")
        if level in self.config.self_attention:
            x = self.attention(x, f"{place}_{level}_self_attention", None)
        if level in self.config.text_attention:
            x = self.attention(x, f"{place}_{level}_text_attention", text)
        return x

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, small: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        temb = self.embedding("time_embedding", t) + self.embedding("class_embedding", level) + self.pooled(text)
        tokens = self.linear(self.layer_norm(text, "text_norm"), "text_proj")
        h = self.conv(torch.cat([x, small], 1), "conv_in")
        skips = []
        for i in range(len(self.config.channels)):
            h = self.conv(h, f"down_blocks_{i}_conv", stride=2)
            h = self.blocks(h, "down_blocks", i, temb, tokens)
            skips.append(h)
        for i in reversed(range(len(self.config.channels))):
            if i < len(self.config.channels) - 1:
                h = (h + skips[i]) / 2**0.5
            h = self.blocks(h, "up_blocks", i, temb, tokens)
            h = self.conv(F.interpolate(h, scale_factor=2), f"up_blocks_{i}_conv")
        return self.linear(h.permute(0, 2, 3, 1), "conv_out").permute(0, 3, 1, 2)


def inputs(config: EfficientUNetConfig, side: tuple[int, int]) -> tuple[jax.Array, jax.Array, Cond]:
    random = np.random.default_rng(0)
    x, small = (jnp.asarray(random.normal(size=(2, *side, 3)), jnp.float32) for _ in range(2))
    text = jnp.asarray(random.normal(size=(2, 5, config.text_dim)), jnp.float32)
    return x, jnp.array([3.0, 870.0]), Cond(text, concat=small, label=jnp.array([0, 250]))


def test_parity_with_the_figures_in_pytorch():
    """One assembly has the order of convolutions and resampling, the skips' scale and what has none."""
    module = EfficientUNet(TINY)
    params = drawn(jax.eval_shape(lambda: module.init(jax.random.key(0), *TINY.example_inputs()))["params"])
    x, t, cond = inputs(TINY, (16, 24))
    own = np.asarray(jax.jit(module.apply)({"params": params}, x, t, cond))
    arrays = (x.transpose(0, 3, 1, 2), t, cond.context, cond.concat.transpose(0, 3, 1, 2), cond.label)
    with torch.no_grad():
        reference = Assembly(params, TINY)(*(torch.tensor(np.asarray(array), dtype=torch.float32) for array in arrays))
    reference = reference.permute(0, 2, 3, 1).numpy()
    assert np.abs(own - reference).max() < 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    config = VARIANTS[name]
    module = EfficientUNet(config)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *config.example_inputs()))
    assert size(shapes["params"]) == TOTALS[name]


def flops(module: Any, side: int) -> int:
    """Of one network call for an image, by tracing."""
    c = module.config
    label = None if c.classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.ShapeDtypeStruct((1, 77, c.context_dim), jnp.float32)
    x = jax.ShapeDtypeStruct((1, side, side, c.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *c.example_inputs()))
    return count(module.apply, params, x, t, Cond(text, label=label))


def test_a_step_costs_half_of_a_plain_network_s():
    """The paper claims 2 to 3 times the speed (section 2.4); beside it the network of IF for the same task."""
    efficient = flops(EfficientUNet(VARIANTS["imagen_sr256"]), 256)
    plain = flops(added_kv_unet.AddedKVUNet(added_kv_unet.VARIANTS["if_ii_m"]), 256)
    print(f"{efficient / 1e9:.0f} and {plain / 1e9:.0f} GFLOP, {plain / efficient:.2f} times as many")
    assert plain > 2.0 * efficient


def test_a_block_costs_the_same_at_every_level():
    """At half the side twice the channels cost the same and hold four times the parameters."""
    few = dataclasses.replace(TINY, self_attention=(), text_attention=())
    base, high, low = (flops(EfficientUNet(dataclasses.replace(few, layers=n)), 32) for n in ((1, 1), (2, 1), (1, 2)))
    assert high - base == pytest.approx(low - base, rel=1e-3)
