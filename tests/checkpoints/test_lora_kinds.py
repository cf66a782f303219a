"""Kinds of adapters that diffusers refuses, in files of LyCORIS' own modules: each layer gives what theirs give."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import zoo
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file

from sdjax.checkpoints.lora.names import layers_of
from sdjax.checkpoints.lora.reading import entry_of, read_lora
from sdjax.models.weight_changes import changed, to_torch

# Layers of the tiny model, as PyTorch has them; the projection is a convolution there.
LAYERS = {
    "linear": (
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        lambda: torch.nn.Linear(64, 64, bias=False),
    ),
    "wide": ("down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj", lambda: torch.nn.Linear(64, 512)),
    "conv": ("down_blocks_1_resnets_0_conv1", lambda: torch.nn.Conv2d(64, 128, 3, padding=1)),
    "point": ("down_blocks_0_attentions_0_proj_in", lambda: torch.nn.Conv2d(64, 64, 1)),
    "group": ("down_blocks_0_resnets_0_norm1", lambda: torch.nn.GroupNorm(32, 64)),
    "layer": ("down_blocks_0_attentions_0_transformer_blocks_0_norm1", lambda: torch.nn.LayerNorm(64)),
}
RANK = {"lora_dim": 4, "alpha": 2}
DORA = {**RANK, "weight_decompose": True}
ADAPTERS = {
    "locon": (LoConModule, RANK, ("linear", "conv", "point")),
    "locon_cp": (LoConModule, {**RANK, "use_tucker": True}, ("conv",)),
    "dora": (LoConModule, DORA, ("linear", "wide", "conv", "point")),
    "dora_of_inputs": (LoConModule, {**DORA, "wd_on_out": False}, ("linear", "wide", "conv")),
    "loha": (LohaModule, RANK, ("linear", "wide", "conv", "point")),
    "loha_tucker": (LohaModule, {**RANK, "use_tucker": True}, ("conv",)),
    "loha_dora": (LohaModule, DORA, ("linear", "conv")),
    "lokr": (LokrModule, {**RANK, "factor": 4}, ("linear", "wide", "conv", "point")),
    "lokr_both": (LokrModule, {**RANK, "factor": 8, "decompose_both": True, "lora_dim": 2}, ("wide", "conv")),
    "lokr_whole": (LokrModule, {**RANK, "factor": 8, "full_matrix": True}, ("linear", "conv")),
    "lokr_tucker": (LokrModule, {**RANK, "factor": 4, "use_tucker": True}, ("conv",)),
    "lokr_dora": (LokrModule, {**DORA, "factor": 4}, ("linear", "conv")),
    "ia3": (IA3Module, {}, ("linear", "conv")),
    "ia3_on_input": (IA3Module, {"train_on_input": True}, ("wide",)),
    "full": (FullModule, {}, ("linear", "wide", "conv")),
    "norms": (NormModule, {}, ("group", "layer")),
}
CASES = [(kind, layer) for kind, (_, _, layers) in ADAPTERS.items() for layer in layers]


@pytest.fixture(scope="module")
def layers():
    return layers_of({"unet": zoo.UNETS["sd1"]})


def randomised(module: torch.nn.Module, scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = scale * torch.randn(parameter.shape, generator=draw)
        parameter.data = parameter.data.abs() * (1 + noise) if name == "dora_scale" else parameter.data + noise


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_outputs(kind, layer, layers, tmp_path):
    make, options, _ = ADAPTERS[kind]
    name, torch_layer = LAYERS[layer][0], LAYERS[layer][1]()
    randomised(torch_layer, 0.1)
    base = {n: p.detach().clone() for n, p in torch_layer.named_parameters()}
    adapter = make("adapter", torch_layer, 1.0, **options)
    randomised(adapter, 0.2)
    hw = [5, 5] if base["weight"].ndim == 4 or layer == "group" else []
    x = torch.randn(2, 64, *hw, generator=torch.manual_seed(1))
    with torch.no_grad():
        before = torch_layer(x)
        adapter.apply_to()
        expected = torch_layer(x)
        tensors = adapter.custom_state_dict() or adapter.state_dict()
        adapter.restore()
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_{name}.{n}": t.detach().clone().contiguous() for n, t in tensors.items()}, path)

    file = read_lora(path, layers)
    ((at, _),) = file.layers.items()
    kernel = layers[at].kind.inward(base["weight"].numpy())
    own = {"scale" if kernel.ndim == 1 else "kernel": kernel} | (
        {"bias": base["bias"].numpy()} if "bias" in base else {}
    )
    made = {**own, **jax.jit(changed)(own, [entry_of(file, layers[at])], [1.0])}

    with torch.no_grad():
        for leaf, array in made.items():
            array = np.array(to_torch(array) if leaf == "kernel" else array)
            parameter = torch_layer.bias if leaf == "bias" else torch_layer.weight
            parameter.copy_(torch.from_numpy(array).reshape(parameter.shape))
        found = torch_layer(x)
    assert (expected - before).abs().max() > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-5)
