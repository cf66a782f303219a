"""IP-Adapter's networks beside those of diffusers, which reads the same file."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import zoo
from diffusers import UNet2DConditionModel
from torch_reference import channels_first, channels_last, drawn, randomised, translated

from sdjax.checkpoints.mapping import export, read
from sdjax.checkpoints.networks import ip_adapter as conversion
from sdjax.checkpoints.networks import unet as unet_conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import size
from sdjax.models.conditioning import Cond
from sdjax.models.ip_adapter import IPAdapter, IPAdapterConfig, ResamplerConfig
from sdjax.models.unet import SD1, SDXL, UNet

XL = {"context_dim": 2048, "transformers": SDXL.transformers}
PLUS = {"tokens": 16, "image_dim": 1280}
# tencent-ailab/IP-Adapter's released files: projection and keys and values.
TOTALS = {
    IPAdapterConfig(): 22_319_616,
    IPAdapterConfig(**XL): 349_188_096,
    IPAdapterConfig(image_dim=1280, **XL): 351_285_248,
    IPAdapterConfig(resampler=ResamplerConfig(), **PLUS): 49_087_488,
    IPAdapterConfig(resampler=ResamplerConfig(1280, 4, 20), **PLUS, **XL): 423_748_864,
}
UNETS = {"sd1": zoo.UNETS["sd1"], "sdxl": zoo.UNETS["sdxl"]}
RNG = np.random.default_rng(5)


def test_parameter_totals():
    assert {config: size(conversion.shapes(config)) for config in TOTALS} == TOTALS


def test_attention_layers_have_diffusers_numbers():
    """Odd numbers: 1 to 11 on the way down of SD 1.5, 13 to 29 on the way up, 31 in the middle; 139 is XL's last."""
    for unet, count in ((SD1, 16), (SDXL, 70)):
        sizes = {"transformers": unet.transformers, "context_dim": unet.context_dim}
        rows = [r for r in conversion.table(IPAdapterConfig(**sizes)).rows if ".to_k_ip" in r.theirs]
        assert [row.theirs.split(".")[1] for row in rows] == [str(2 * i + 1) for i in range(count)]
        assert [row.ours.split("_")[0] for row in rows] == sorted(
            (row.ours.split("_")[0] for row in rows), key=["down", "up", "mid"].index
        )


def adapter(unet: str, plus: bool) -> IPAdapterConfig:
    """Tiny."""
    config = UNETS[unet]
    resampler = ResamplerConfig(width=64, depth=4, heads=2) if plus else None
    return IPAdapterConfig(40, config.context_dim, 3 if plus else 4, resampler, config.transformers)


@pytest.mark.parametrize(("name", "plus"), [("sd1", False), ("sdxl", True)], ids=["sd1-plain", "sdxl-plus"])
def test_unet_with_image_tokens_agrees_with_diffusers_to_1e_4(name: str, plus: bool):
    """With two images a row, and another scale for every transformer."""
    sizes = UNETS[name]
    config = adapter(name, plus)
    params = drawn(conversion.shapes(config))
    tensors = export(conversion.table(config), params, conversion.shapes(config), "")
    theirs = randomised(UNet2DConditionModel(**unet_conversion.to_diffusers_config(sizes)))
    unet_params = translated(theirs, unet_conversion.table(sizes), unet_conversion.shapes(sizes))
    groups = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        group, _, rest = key.partition(".")
        groups[group][rest] = torch.from_numpy(np.array(tensor))
    theirs._load_ip_adapter_weights([groups])
    scales = [0.3 + 0.2 * i for i in range(len(sizes.transformers))]
    for transformer, scale in zip(sizes.transformers, scales, strict=True):
        for key, processor in theirs.attn_processors.items():
            if key.replace(".", "_").startswith(f"{transformer.name}_") and hasattr(processor, "scale"):
                processor.scale = [scale]
    x = RNG.standard_normal((2, 8, 8, 4)).astype("f")
    t, context = np.float32([981.0, 3.0]), RNG.standard_normal((2, 7, sizes.context_dim)).astype("f")
    states = RNG.standard_normal((2, 2, *((5,) if plus else ()), config.image_dim)).astype("f")
    added, vector = {"image_embeds": [torch.from_numpy(states)]}, None
    if sizes.vector_dim is not None:
        text, ids = RNG.standard_normal((2, 64)).astype("f"), np.float32([[8, 8, 0, 0, 8, 8], [9, 7, 1, 2, 6, 5]])
        added |= {"text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(ids)}
        sinusoids = theirs.add_time_proj(torch.from_numpy(ids).flatten()).numpy()
        vector = np.concatenate([text, sinusoids.reshape(2, -1)], axis=1)
    with torch.no_grad():
        expected = theirs(
            channels_first(x), torch.from_numpy(t), torch.from_numpy(context), added_cond_kwargs=added
        ).sample

    @jax.jit
    def ours(params, unet_params):
        module = IPAdapter(config)
        tokens = module.apply({"params": params}, states.reshape(4, *states.shape[2:]), method="tokens")
        made = module.apply({"params": params}, tokens.reshape(2, -1, config.context_dim), method="keys_values")
        images = {
            t.name: [kv._replace(values=kv.values * scale) for kv in made[t.name]]
            for t, scale in zip(config.transformers, scales, strict=True)
        }
        cond = Cond(context=context, vector=vector, images=images)
        return UNet(sizes).apply({"params": unet_params}, x, t, cond)

    np.testing.assert_allclose(ours(params, unet_params), channels_last(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("plus", [False, True], ids=["plain", "plus"])
def test_sizes_are_those_of_the_tensors(plus: bool):
    """Both ways: what is written has the sizes that are read, and the same parameters."""
    config, shapes = adapter("sdxl", plus), conversion.shapes(adapter("sdxl", plus))
    params = drawn(shapes)
    tensors = export(conversion.table(config), params, shapes, "")
    found = conversion.config_of({key: t.shape for key, t in tensors.items()}, UNETS["sdxl"], "file")
    assert found == config
    again = read(conversion.table(found), tensors, conversion.shapes(found), np.float32, "file")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_groups_of_a_pickle_are_those_of_safetensors():
    """What else a file holds is passed over; a tensor in a group's place is none."""
    groups = {"image_proj": {"norm.bias": 1}, "ip_adapter": {"1.to_k_ip.weight": 2}, "lora": {"x": 3}}
    flat = {"image_proj.norm.bias": 1, "ip_adapter.1.to_k_ip.weight": 2}
    assert conversion.flat(groups) == conversion.flat({**flat, "lora.x": 3}) == flat
    assert conversion.flat({"image_proj": np.zeros(3)}).keys() <= {"image_proj"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"image_proj.proj.3.weight": (8,)}, "file is an IP-Adapter of the kind 'full face'; plain and plus ones"),
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8)}, "of the kind 'FaceID plus'"),
        ({"image_proj.proj.0.weight": (8, 8)}, "of the kind 'FaceID'"),
        ({"unet.conv_in.weight": (8, 8)}, "file is no IP-Adapter: it holds no tensors of image_proj and ip_adapter"),
        (
            {
                "image_proj.proj.weight": (512, 40),
                "image_proj.norm.weight": (128,),
                "ip_adapter.1.to_k_ip.weight": (8,),
            },
            "file is for a UNet of 1 cross-attention layers to 128 features; this one has 4 to 64",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(found: dict, message: str):
    with pytest.raises(UserError, match=message):
        conversion.config_of(found, UNETS["sd1"], "file")
