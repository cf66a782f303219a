"""LoRA factors of a network against peft's layers, and against kernels with their change in them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig
from test_unet import SHAPES, reference
from torch_reference import channels_first, channels_last, drawn, translated

from sdjax.checkpoints.mapping import places
from sdjax.checkpoints.networks import unet as conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, merge, unflatten
from sdjax.models.conditioning import Cond, apply
from sdjax.models.layers import Conv, Downsample, Upsample
from sdjax.models.lora import Adaptation, add_factors, layers_of, strip_factors, with_dropout
from sdjax.models.unet import UNet
from sdjax.models.weight_changes import changed

RANK, ALPHA = 4, 6.0


def adapted(config: Any, params: Any, torch_unet: torch.nn.Module, *, dora: bool) -> Any:
    """Our tree with the factors of every layer of a torch network that peft has adapted."""
    modules = dict(torch_unet.named_modules())
    made = {}
    for name, place in places(conversion.table(config), flatten(params)).items():
        layer = modules[place.key.removesuffix(".weight")] if name.endswith("/kernel") else None
        if layer is None or not hasattr(layer, "lora_A"):
            continue
        up = layer.lora_B["default"].weight.detach().numpy()
        own = {"down": place.kind.inward(layer.lora_A["default"].weight.detach().numpy())}
        own |= {"up": up.reshape(up.shape[:2]).T, "scale": np.float32(ALPHA / RANK)}
        if dora:
            own["magnitude"] = layer.lora_magnitude_vector["default"].weight.detach().numpy().reshape(-1)
        made[name.removesuffix("/kernel") + "/lora/0"] = own
    assert len(made) == len(dict(layers_of(params)))
    return merge(params, unflatten(made))


@pytest.mark.parametrize("dora", [False, True])
def test_every_layer_agrees_with_peft_to_1e_5(dora: bool):
    torch_unet = reference(gain=1.0, **SHAPES["sd1"])
    config = conversion.from_diffusers_config(torch_unet.config)
    params = translated(torch_unet, conversion.table(config), conversion.shapes(config))
    targets = [n for n, m in torch_unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    torch_unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora))
    generator = torch.Generator().manual_seed(1)
    for at, parameter in torch_unet.named_parameters():
        if "lora_B" in at:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        if "magnitude" in at:
            parameter.data *= 0.8 + 0.4 * torch.rand(parameter.shape, generator=generator)
    rng = np.random.default_rng(1)
    x, context = (rng.standard_normal(s, np.float32) for s in ((2, 16, 24, config.in_channels), (2, 7, 24)))
    t = np.array([981.0, 3.5], np.float32)
    with torch.no_grad():
        inputs = channels_first(x), torch.from_numpy(t), torch.from_numpy(context)
        expected = channels_last(torch_unet(*inputs).sample)
        torch_unet.disable_adapters()
        base = channels_last(torch_unet(*inputs).sample)
    assert np.abs(expected - base).std() > 0.1
    tree = adapted(config, params, torch_unet, dora=dora)
    out = jax.jit(lambda tree: apply(UNet(config), tree, x, t, Cond(context)))(tree)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


def merged(params: Any) -> Any:
    """The tree with kernels that do what kernels and factors did."""
    if "lora" in params:
        entries = list(params["lora"].values())
        own = {name: leaf for name, leaf in params.items() if name != "lora"}
        return own | changed(own, entries, [1.0] * len(entries))
    return {name: merged(below) if isinstance(below, dict) else below for name, below in params.items()}


@pytest.mark.parametrize(
    "module", [Conv(6), Conv(6, stride=2), Conv(6, kernel=1), Downsample(), Upsample(), nn.Dense(6)]
)
def test_branches_do_what_merged_kernels_do(module: nn.Module):
    """Of strides, of paddings, of doubled images, with CP cores, two files at once, and a scale for each image."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 8, 6, 6)).astype(np.float32)
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    (path, layer), *_ = layers_of({"net": params})
    down = rng.standard_normal((*layer["kernel"].shape[:-1], 2), np.float32)
    up = 0.1 * rng.standard_normal((2, layer["kernel"].shape[-1]), np.float32)
    second = {"down": down, "up": up}
    if down.ndim == 4:
        second = {"mid": down[:, :, :2], "down": down[:1, :1], "up": up}
    first = {"down": -down, "up": 2 * up}

    def tree(*scales: Any) -> Any:
        own: Any = {"lora": {"0": {**first, "scale": scales[0]}, "1": {**second, "scale": scales[1]}}}
        for part in reversed(path.split("/")[1:]):
            own = {part: own}
        return merge(params, own)

    @jax.jit
    def outputs(a: Any, b: Any) -> Any:
        rows = apply(module, tree(a, b), x)
        return rows, [apply(module, merged(tree(*pair)), x) for pair in zip(a, b, strict=True)]

    rows, (one, other) = outputs(jnp.array([1.0, 0.0]), jnp.array([0.5, -0.3]))
    np.testing.assert_allclose(rows, np.concatenate([one[:2], other[2:]]), atol=2e-5, rtol=0)
    assert np.abs(one[2:] - other[2:]).max() > 0.1


def test_fresh_factors_change_nothing_and_can_be_stripped():
    module = nn.Dense(6)
    params = {"net": drawn(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 5)))["params"])}
    x = jnp.ones((3, 5))
    made = add_factors(params, ("n*",), Adaptation(rank=2, alpha=3.0, dropout=0.5), jax.random.key(1))
    np.testing.assert_array_equal(apply(module, made["net"], x), apply(module, params["net"], x))
    assert jax.tree.all(jax.tree.map(np.array_equal, strip_factors(made), params))
    own = made["net"]["lora"]["0"]
    assert own["scale"] == 1.5
    assert own["down"].std() == pytest.approx(1 / 2, rel=0.5)
    program = jax.make_jaxpr(lambda p: module.apply({"params": p}, x))(params["net"])
    assert str(jax.make_jaxpr(lambda p: apply(module, p, x))(params["net"])) == str(program)


def test_entries_of_a_layer_draw_factors_of_their_own():
    params, sizes, key = {"net": {"kernel": jnp.zeros((64, 64))}}, Adaptation(rank=4), jax.random.key(1)
    for name in ("0", "1", "2"):
        params = add_factors(params, ("net",), sizes, key, name)
    first, *others = (entry["down"].ravel() for entry in params["net"]["lora"].values())
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.3


def test_dropout_zeroes_what_lies_between_and_keeps_the_mean():
    """With the identity as factors the branch is the input, of which a share is zero and the rest larger."""
    entry = {"down": jnp.eye(8), "up": jnp.eye(8), "scale": jnp.float32(1), "dropout": jnp.float32(0.25)}
    params = {"kernel": jnp.zeros((8, 8)), "lora": {"0": entry}}
    module, x = nn.Dense(8, use_bias=False), jnp.ones((500, 8))
    out = np.asarray(apply(module, with_dropout(params, jax.random.key(0)), x))
    assert set(np.unique(out.round(5))) == {0.0, np.float32(1.33333)}
    assert out.mean() == pytest.approx(1.0, abs=0.03)
    np.testing.assert_array_equal(apply(module, params, x), x)


def test_a_pattern_without_a_layer_is_an_error():
    params = {"unet": {"to_q": {"kernel": jnp.zeros((2, 2))}}}
    with pytest.raises(UserError, match=r"'unet/to_x' names no .* layer, such as 'unet/to_q'"):
        add_factors(params, ("unet/to_x",), Adaptation(), jax.random.key(0))
