from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from sdjax.checkpoints.mapping import SAME, KeyMapping, KeyTable, export, places, read, traced
from sdjax.checkpoints.networks import autoencoder, clip, unet
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, unflatten
from sdjax.models.autoencoder import AutoencoderConfig
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.unet import UNetConfig

UNET = UNetConfig(channels=(8, 16), depths=(1, 2), mid_depth=2, heads=(2, 4), context_dim=6, groups=4, vector_dim=5)
VAE = AutoencoderConfig(channels=(8, 16), layers_per_block=1, groups=4)
CLIP = CLIPTextConfig(vocab_size=11, width=8, layers=2, heads=2, feed_forward=12, max_length=7, projection_dim=4)
MODELS = {
    "unet with 1x1 convolutions": (unet.table(UNET), unet.shapes(UNET)),
    "unet with linear layers": (unet.table(dataclasses.replace(UNET, linear_projection=True)), unet.shapes(UNET)),
    "autoencoder": (autoencoder.TABLE, autoencoder.shapes(VAE)),
    "text encoder": (clip.TABLE, clip.shapes(CLIP)),
}


def random_like(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    return unflatten({name: rng.standard_normal(s.shape, np.float32) for name, s in flatten(shapes).items()})


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_both_directions_are_bit_identical(name: str):
    table, shapes = MODELS[name]
    params = random_like(shapes)
    stored = {key: np.array(array) for key, array in export(table, params, shapes, name).items()}
    again = read(table, stored, shapes, np.float32, name)
    assert_same(flatten(again), flatten(params))
    assert_same(export(table, again, shapes, name), stored)


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        TRACED.append((self.width, x.shape[-1]))
        return nn.Dense(self.width)(nn.LayerNorm()(x))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate((4, 8, 8, 8, 4, 8)):
            x = Block(width, name=f"block_{i}")(x)
        return x


TRACED: list[tuple[int, int]] = []


def test_equal_blocks_are_traced_once():
    TRACED.clear()
    found = traced(Blocks().init, np.zeros((1, 4), np.float32))
    assert TRACED == [(4, 4), (8, 4), (8, 8), (4, 8)]
    assert found == jax.eval_shape(Blocks().init, jax.random.key(0), np.zeros((1, 4), np.float32))["params"]
    assert flatten(found)["block_5/Dense_0/kernel"].shape == (4, 8)


@pytest.mark.parametrize("module", [unet.UNet(UNET), clip.CLIPText(CLIP)])
def test_traced_shapes_are_those_of_init(module: Any):
    inputs = UNET.example_inputs() if module.config is UNET else (np.zeros((1, 1), np.int32),)
    assert traced(module.init, *inputs) == jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def test_kinds_put_axes_where_torch_has_them():
    """Written out by index, so that two wrong transpositions cannot cancel."""
    table, shapes = MODELS["unet with 1x1 convolutions"]
    params = random_like(shapes)
    stored = export(table, params, shapes, "")
    conv, kernel = stored["conv_in.weight"], params["conv_in"]["kernel"]
    assert conv.shape == (8, 4, 3, 3)
    assert conv[5, 2, 0, 1] == kernel[0, 1, 2, 5]
    linear = stored["time_embedding.linear_1.weight"]
    assert linear.shape == (32, 8)
    assert linear[20, 3] == params["time_embedding"]["linear_1"]["kernel"][3, 20]
    pointwise = stored["mid_block.attentions.0.proj_in.weight"]
    assert pointwise.shape == (16, 16, 1, 1)
    assert pointwise[7, 2, 0, 0] == params["mid_block_attentions_0"]["proj_in"]["kernel"][2, 7]


def test_every_misfit_is_listed_and_long_lists_are_cut():
    table, shapes = MODELS["autoencoder"]
    stored = dict(export(table, random_like(shapes), shapes, ""))
    del stored["decoder.conv_in.bias"]
    stored["encoder.conv_in.weight"] = stored["encoder.conv_in.weight"][:, :2]
    stored |= {f"loss.discriminator.{i}": np.zeros(1) for i in range(23)}
    with pytest.raises(UserError) as error:
        read(table, stored, shapes, np.float32, "some/file")
    message = str(error.value)
    assert "some/file" in message
    assert "1 missing: decoder.conv_in.bias\n" in message
    assert "23 unexpected: loss.discriminator.0, " in message
    assert "loss.discriminator.19 and 3 more\n" in message
    assert "1 of another shape: encoder.conv_in.weight (8x2x3x3, not 8x3x3x3)" in message


def test_misfits_are_found_before_anything_is_read():
    class Unreadable:
        shape = (1,)

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read")

    table, shapes = MODELS["autoencoder"]
    stored = {key: Unreadable() for key in export(table, random_like(shapes), shapes, "")}
    stored |= {"x": Unreadable()}
    with pytest.raises(UserError, match="1 unexpected: x"):
        read(table, stored, shapes, np.float32, "")


def test_exporting_another_models_parameters_is_refused():
    table, shapes = MODELS["autoencoder"]
    params = random_like(shapes)
    params["quant_conv"]["scale"] = params["quant_conv"].pop("bias")
    with pytest.raises(UserError, match=r"(?s)1 missing: quant_conv/bias.*1 unexpected: quant_conv/scale"):
        export(table, params, shapes, "")


def test_a_table_that_is_no_bijection_is_refused():
    with pytest.raises(UserError, match="no rule of conversion for 1 parameters: b/kernel"):
        places(KeyTable((KeyMapping("a/kernel", "a.weight", SAME),)), ["a/kernel", "b/kernel"])
    with pytest.raises(UserError, match=r"under one key: x\.weight"):
        places(KeyTable((KeyMapping("*_a", "x.weight", SAME),)), ["1_a", "2_a"])


def test_older_names_and_declared_buffers_are_read():
    table, shapes = MODELS["text encoder"]
    params = random_like(shapes)
    stored = export(table, params, shapes, "")
    bare = {key.removeprefix("text_model."): array for key, array in stored.items()}
    for ids in ("text_model.embeddings.position_ids", "embeddings.position_ids"):
        found = read(table, bare | {ids: np.arange(7)[None]}, shapes, np.float32, "")
        assert_same(flatten(found), flatten(params))

    table, shapes = MODELS["autoencoder"]
    params = random_like(shapes)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = export(table, params, shapes, "")
    for new, name in old.items():
        stored = {key.replace(f".{new}.", f".{name}."): array for key, array in stored.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in stored
    assert_same(flatten(read(table, stored, shapes, np.float32, "")), flatten(params))
    both = stored | {"encoder.mid_block.attentions.0.to_q.bias": np.zeros(16, np.float32)}
    with pytest.raises(UserError, match="twice"):
        read(table, both, shapes, np.float32, "")


def test_values_that_the_type_cannot_hold_are_refused():
    table, shapes = MODELS["text encoder"]
    params = random_like(shapes)
    params["final_layer_norm"]["scale"][2] = 70000.0
    stored = export(table, params, shapes, "")
    with pytest.raises(UserError, match=r"final_layer_norm\.weight in F holds values .* not finite in float16"):
        read(table, stored, shapes, np.float16, "F")
    assert read(table, stored, shapes, np.float32, "F")["final_layer_norm"]["scale"][2] == 70000.0
