"""Images as prompts: pipelines with an IP-Adapter against PyTorch diffusers, which loads the same files.

|difference| of images below 1e-3.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import zoo
from PIL import Image
from test_against_diffusers import NEGATIVES, PROMPTS, SIDES, check, to_torch
from test_hub import Hub
from torch_reference import drawn, randomised

import sdjax
from sdjax.checkpoints.mapping import export
from sdjax.checkpoints.networks import ip_adapter as conversion
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.core.errors import UserError
from sdjax.diffusion_model.conditioners.ip_adapter import block_scales
from sdjax.models.ip_adapter import IPAdapterConfig, ResamplerConfig
from sdjax.models.unet import SD1, SDXL
from sdjax.pipeline import adapters

PIPELINES = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL"}
KINDS = {"plain": ".bin", "plus": ".safetensors"}
EMBEDDING, WIDTH, SEEN = 40, 48, 28  # of the image encoder: features of its embedding and its states, pixels
PLUS = IPAdapterConfig(WIDTH, resampler=ResamplerConfig(64, 4, 2))
BLOCKS = {"down": {"block_2": [0.7]}, "up": {"block_0": [0.0, 1.0]}}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder as h94/IP-Adapter has it, with adapters of every family and kind."""
    folder = tmp_path_factory.mktemp("adapters")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=SEEN, patch_size=7, projection_dim=EMBEDDING)
    randomised(transformers.CLIPVisionModelWithProjection(vision)).save_pretrained(folder / "models" / "image_encoder")
    (folder / "sdxl_models").mkdir()
    for family, (kind, suffix) in ((family, item) for family in PIPELINES for item in KINDS.items()):
        unet = zoo.UNETS[family]
        dim, tokens = (EMBEDDING, 4) if kind == "plain" else (WIDTH, 3)
        resampler = None if kind == "plain" else ResamplerConfig(64, 4, 2)
        config = IPAdapterConfig(dim, unet.context_dim, tokens, resampler, unet.transformers)
        shapes = conversion.shapes(config)
        tensors = export(conversion.table(config), drawn(shapes), shapes, "")
        path = folder / ("models" if family == "sd1" else "sdxl_models") / f"{kind}{suffix}"
        if suffix == ".bin":
            groups = {group: {} for group in conversion.GROUPS}
            for key, tensor in tensors.items():
                group, _, rest = key.partition(".")
                groups[group][rest] = torch.from_numpy(np.array(tensor))
            torch.save(groups, path)
        else:
            write_safetensors(path, tensors, None)
    return folder


def file_of(hub, family: str, kind: str):
    return hub / ("models" if family == "sd1" else "sdxl_models") / f"{kind}{KINDS[kind]}"


@pytest.fixture(scope="session")
def with_adapter(folders, hub):
    """with_adapter(family, kind): the pipeline of this library; XL's image encoder is found in ../models."""
    return functools.cache(lambda family, kind: sdjax.load(folders(family), ip_adapter=file_of(hub, family, kind)))


@pytest.fixture
def theirs_with(in_diffusers, hub):
    """theirs_with(family, kind, what, scale): the pipeline of diffusers, whose UNet has the adapter for the while."""

    @contextlib.contextmanager
    def pipe(family: str, kind: str, scale, what: str = ""):
        made = in_diffusers(f"{PIPELINES[family]}{what}Pipeline", family)
        file = file_of(hub, family, kind)
        made.load_ip_adapter(hub, file.parent.name, file.name, image_encoder_folder="models/image_encoder")
        made.set_ip_adapter_scale(scale)
        yield made
        made.unload_ip_adapter()

    return pipe


@pytest.fixture
def seen():
    """Two images of other proportions than CLIP's square."""
    rng = np.random.default_rng(8)
    noise = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((9, 14), (12, 5))]
    return [Image.fromarray(pixels).resize((60, 44), Image.Resampling.BICUBIC) for pixels in noise]


@pytest.mark.parametrize(
    ("family", "kind", "scale", "count"),
    [("sd1", "plain", 0.6, 1), ("sd1", "plus", 1.0, 2), ("sdxl", "plain", BLOCKS, 2), ("sdxl", "plus", 0.5, 1)],
)
def test_images_are_diffusers(family, kind, scale, count, theirs_with, with_adapter, seen, noise):
    """One image of a prompt or two, with guidance; scales of all transformers or by block."""
    given = {"guidance_scale": 4.0}
    with theirs_with(family, kind, scale) as pipe:
        expected = pipe(
            PROMPTS,
            negative_prompt=NEGATIVES,
            ip_adapter_image=[seen[:count]],
            num_inference_steps=3,
            latents=to_torch(noise),
            output_type="np",
            **given,
        ).images
    how = {"ip_blocks": scale} if isinstance(scale, dict) else {"ip_scale": scale}
    ours = with_adapter(family, kind)
    found = ours(PROMPTS, NEGATIVES, steps=3, latents=noise, ip_image=seen[:count], **how, **given)
    check(found, expected)
    assert np.abs(found - ours(PROMPTS, NEGATIVES, steps=3, latents=noise, **given)).max() > 0.01


def test_a_scale_compiles_nothing_and_zero_is_the_base(with_adapter, ours, seen, noise, compilations):
    """To the bit: the images of a pipeline without adapter; each prompt may have an image of its own."""
    pipe, how = with_adapter("sd1", "plain"), {"steps": 3, "latents": noise, "guidance_scale": 4.0}
    first = pipe(PROMPTS, ip_image=[[one] for one in seen], ip_scale=0.6, **how)
    compilations.clear()
    second = pipe(PROMPTS, ip_image=[[one] for one in seen[::-1]], ip_scale=1.2, ip_blocks={"mid": 0.5, "up": 1}, **how)
    zero = pipe(PROMPTS, ip_image=[[one] for one in seen], ip_scale=0, **how)
    assert not compilations
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(zero, ours(PROMPTS, **how))


def test_an_image_is_the_same_in_every_batch(with_adapter, seen):
    pipe = with_adapter("sd1", "plain")
    how = {"steps": 3, "guidance_scale": 4.0, "seed": 3, **SIDES}
    together = pipe(PROMPTS, ip_image=[[one] for one in seen], batch_size=2, **how)
    np.testing.assert_allclose(together[1:], pipe(PROMPTS[1], ip_image=seen[1], first_index=1, **how), atol=1e-5)


@pytest.mark.parametrize("what", ["Img2Img", "Inpaint"])
def test_with_a_given_image(what, theirs_with, with_adapter, seen, picture, mask):
    given = {"guidance_scale": 4.0, "strength": 0.6}
    parts = {"image": picture, **({"mask_image": mask, **SIDES} if what == "Inpaint" else {})}
    with theirs_with("sd1", "plain", 0.8, what) as pipe:
        expected = pipe(
            PROMPTS,
            **parts,
            ip_adapter_image=seen[0],
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            **given,
        ).images
    how = {"init_image": picture, **({"mask": mask, "paste": False} if what == "Inpaint" else {})}
    found = with_adapter("sd1", "plain")(
        PROMPTS, steps=5, seed=7, rng="torch", ip_image=seen[0], ip_scale=0.8, **how, **given
    )
    check(found, expected)


def test_scales_by_block_are_diffusers():
    """Names of transformers, in the order of their keys and values."""

    def scaled(given, transformers=SDXL.transformers):
        found = block_scales(given, transformers, "XL")
        return {t.name: float(scale) for t, scale in zip(transformers, found, strict=True) if scale}

    up, down = "up_blocks_0_attentions_", "down_blocks_2_attentions_"
    assert scaled("style") == {f"{up}1": 1.0}
    assert scaled("layout") == {f"{down}1": 1.0}
    assert scaled("style,layout") == {f"{up}1": 1.0, f"{down}1": 1.0}
    assert scaled('{"up": {"block_0": [0, 0.5, 0]}, "mid": 2}') == {f"{up}1": 0.5, "mid_block_attentions_0": 2.0}
    assert scaled({"down": 1}) == {f"down_blocks_{i}_attentions_{j}": 1.0 for i in (1, 2) for j in (0, 1)}
    assert len(scaled(None)) == len(SDXL.transformers)
    for wrong, message in {
        "color": "unknown ip_blocks 'color'; choose one of: layout, style",
        '{"up": {"block_2": 1}}': "unknown block in ip_blocks 'up.block_2' in XL; choose one of: down.block_1, ",
        '{"left": 1}': "unknown block in ip_blocks 'left' in XL",
        '{"up": {"block_0": [1, 2]}}': r"ip_blocks \[1, 2\] of up.block_0: give a number, or 3 of them",
        '{"mid": "much"}': "ip_blocks 'much' of mid: give a number, or 1 of them",
        "{mid}": "ip_blocks is not JSON",
    }.items():
        with pytest.raises(UserError, match=message):
            block_scales(wrong, SDXL.transformers, "XL")
    with pytest.raises(UserError, match=r"unknown block in ip_blocks 'up.block_0' in SD"):
        block_scales("style", SD1.transformers, "SD")


def test_an_adapter_stays_out_of_what_is_saved(with_adapter, folder, tmp_path):
    with_adapter("sd1", "plain").save(tmp_path / "copy")
    files = [sorted(path.relative_to(top) for path in top.rglob("*")) for top in (folder, tmp_path / "copy")]
    assert files[0] == files[1]


def test_an_image_encoder_comes_from_the_hub(hub, tmp_path, monkeypatch):
    """From `models/image_encoder` for SDXL's adapter, of its revision, and only what fits is downloaded."""
    shutil.copytree(hub, tmp_path / "served" / "acme" / "IP-Adapter")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Hub(tmp_path / "served")
    from_there = functools.partial(adapters.resolve, cache_dir=tmp_path / "cache", endpoint=server.url)
    monkeypatch.setattr(adapters, "resolve", from_there)
    try:
        found = adapters.find_encoder("acme/IP-Adapter/sdxl_models/plus.safetensors@v1", None, PLUS)
        place = "models/image_encoder"
        assert found.parts[-2:] == tuple(place.split("/"))
        assert server.served == [f"{place}/config.json", f"{place}/model.safetensors"]
        with pytest.raises(UserError, match="there is no image encoder of 7 features"):
            adapters.find_encoder("acme/IP-Adapter/models/plus.safetensors", None, replace(PLUS, image_dim=7))
        with pytest.raises(UserError, match=r"beside it nor .* is one \(.*acme/gated.* is gated: accept its terms"):
            adapters.find_encoder("acme/gated/models/plus.safetensors", None, PLUS)
    finally:
        server.stop()


def test_mistakes_are_said_in_one_line(hub, folders, ours, seen, with_adapter, tmp_path):
    for given, message in {
        ("ip_image",): "ip_image changes nothing without an IP-Adapter; leave it out",
        ("ip_scale",): "ip_scale 0.5 changes nothing without an ip_image; leave it out",
    }.items():
        with pytest.raises(UserError, match=message):
            ours.prepare("", **{name: seen[0] if name == "ip_image" else 0.5 for name in given})
    with pytest.raises(UserError, match="ip_image is an empty list"):
        with_adapter("sd1", "plain").prepare("", ip_image=[])
    alone = tmp_path / "alone.bin"
    alone.write_bytes(file_of(hub, "sd1", "plain").read_bytes())
    with pytest.raises(UserError, match=r"there is no image encoder of 40 features for .*alone.bin: neither image_enc"):
        sdjax.load(folders("sd1"), ip_adapter=alone)
    narrow = tmp_path / "narrow"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=14, patch_size=7, projection_dim=8)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(narrow)
    with pytest.raises(UserError, match=r"image_encoder .*narrow' gives 8 features; .*alone.bin reads 40"):
        sdjax.load(folders("sd1"), ip_adapter=alone, image_encoder=narrow)
    with pytest.raises(UserError, match="is for a UNet of 4 cross-attention layers to 64 features; this one has"):
        sdjax.load(folders("sdxl"), ip_adapter=alone, image_encoder=hub / "models" / "image_encoder")
    with pytest.raises(UserError, match="changes nothing without an ip_adapter"):
        sdjax.load(folders("sd1"), image_encoder=narrow)
