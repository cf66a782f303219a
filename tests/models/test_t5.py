"""T5's encoder beside transformers', every state, float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch_reference import drawn, randomised, translated
from transformers.models.t5.modeling_t5 import T5Attention

from sdjax.checkpoints.checkpoint import ALL_FORMATS, Component
from sdjax.checkpoints.layouts.diffusers import read_component, write_component
from sdjax.checkpoints.networks import t5 as conversion
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, size
from sdjax.models.t5 import VARIANTS, T5Config, T5Encoder, relative_buckets

# google-research/t5x, examples/t5; and of the checkpoints of transformers.
TOTALS = {
    "t5_small": 35_330_816,
    "t5_base": 109_628_544,
    "t5_large": 334_939_648,
    "t5_3b": 1_240_909_824,
    "t5_11b": 4_864_791_552,
    "t5_v1_1_small": 35_332_800,
    "t5_v1_1_base": 109_628_544,
    "t5_v1_1_large": 341_231_104,
    "t5_v1_1_xl": 1_223_527_424,
    "t5_v1_1_xxl": 4_762_310_656,
}
SIZES = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
KINDS = {
    "gated": SIZES | {"feed_forward_proj": "gated-gelu"},
    "original": SIZES | {"feed_forward_proj": "relu"},
    "narrow": SIZES | {"feed_forward_proj": "gated-gelu", "num_heads": 3},  # 3 heads of 8 beside a width of 32
}
GOLDEN = {
    **{0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -23: 11, -32: 12, -46: 13, -64: 14, -91: 15, -255: 15},
    **{1: 17, 7: 23, 8: 24, 16: 26, 32: 28, 64: 30, 90: 30, 91: 31, 255: 31},
}
ENDS = {"alone": (1,), "padded": (11, 5), "long": (128, 100), "empty": (1, 11)}
"""Tokens of each text of a batch, its end included."""
LENGTHS = {"alone": 1, "padded": 77, "long": 128, "empty": 77}


def reference(sizes: dict) -> Any:
    """Random weights; scores are not scaled, so queries are as much smaller as they are after T5's own training."""
    config = transformers.T5Config(**sizes)
    model: Any = randomised(transformers.T5EncoderModel._from_config(config, attn_implementation="eager"))
    for block in model.encoder.block:
        block.layer[0].SelfAttention.q.weight.data *= config.d_kv**-0.5
    return model


def tokens(ends: tuple[int, ...], length: int) -> np.ndarray:
    """Ids of random texts, each with its end of text, then pads."""
    ids = np.random.default_rng(length).integers(3, 1103, (len(ends), length))
    for row, end in zip(ids, ends, strict=True):
        row[end - 1], row[end:] = 1, 0
    return ids


def test_parameter_totals():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS
    assert size(conversion.shapes(T5Config(2048, 128, 4, 4, 32, 256))) == 918_784


def test_buckets_of_distances():
    """At 16, 32 and 64 the logarithm is a whole number, at 91 the last bucket begins."""
    found = relative_buckets(256)
    assert {key: int(found[max(-key, 0), max(key, 0)]) for key in GOLDEN} == GOLDEN
    place = torch.arange(256)
    theirs = T5Attention._relative_position_bucket(place[None] - place[:, None])
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_states_agree_with_transformers_to_1e_5(kind: str):
    theirs = reference(KINDS[kind])
    sizes = conversion.from_diffusers_config(theirs.config.to_dict())
    params = {"params": translated(theirs, conversion.TABLE, conversion.shapes(sizes))}
    apply = jax.jit(T5Encoder(sizes).apply)
    for name, ends in ENDS.items():
        ids = tokens(ends, LENGTHS[name])
        for mask in (ids != 0, None):
            with torch.no_grad():
                given = None if mask is None else torch.from_numpy(mask).long()
                expected = theirs(torch.from_numpy(ids), attention_mask=given).last_hidden_state
            assert expected.std() > 0.5
            np.testing.assert_allclose(apply(params, ids, mask), expected, atol=1e-5, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """An encoder as transformers writes it."""
    folder = tmp_path_factory.mktemp("t5")
    reference(KINDS["narrow"]).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def assert_same(found: Component, wanted: Component):
    assert found.config == wanted.config
    for name, leaf in flatten(wanted.params).items():
        np.testing.assert_array_equal(flatten(found.params)[name], leaf, err_msg=name)


def test_shards_are_read(folder: Path, tmp_path: Path):
    reference(KINDS["narrow"]).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(read_component(tmp_path, "text_encoder"), read_component(folder, "text_encoder"))


@pytest.mark.parametrize("keys", [("shared", "encoder.embed_tokens"), ("encoder.embed_tokens",)])
def test_the_embedding_may_be_there_twice_or_under_its_other_name(keys: tuple[str, ...], folder: Path, tmp_path: Path):
    """And beside a decoder, as in google/t5-v1_1-xxl."""
    tensors = stored(folder)
    table = tensors.pop("shared.weight")
    others = {"decoder.block.0.layer.0.SelfAttention.q.weight": table, "lm_head.weight": table}
    save_file(tensors | others | {f"{key}.weight": table.copy() for key in keys}, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    whole = config | {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    del whole["relative_attention_max_distance"]  # as in older configs
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert_same(read_component(tmp_path, "text_encoder"), read_component(folder, "text_encoder"))


def test_types_are_read_tensor_by_tensor(folder: Path, tmp_path: Path):
    """As DeepFloyd IF's variant "fp16" has them: the second half of a feed-forward in float32."""
    mixed = {key: x.astype(np.float32 if ".wo." in key else np.float16) for key, x in stored(folder).items()}
    save_file(mixed, tmp_path / "model.fp16.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    kept = flatten(read_component(tmp_path, "text_encoder", None, variant="fp16").params)
    assert {name: leaf.dtype == np.float32 for name, leaf in kept.items()} == {name: "/wo/" in name for name in kept}
    found = flatten(read_component(tmp_path, "text_encoder", "float32", variant="fp16").params)
    for name, leaf in kept.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], leaf.astype(np.float32), err_msg=name)


def test_transformers_reads_what_is_written(folder: Path, tmp_path: Path):
    found = read_component(folder, "text_encoder")
    write_component(tmp_path, "text_encoder", found)
    assert stored(tmp_path).keys() == stored(folder).keys()
    ids = torch.from_numpy(tokens((11, 5), 20))
    with torch.no_grad():
        ours, theirs = (
            transformers.T5EncoderModel.from_pretrained(path)(ids).last_hidden_state for path in (tmp_path, folder)
        )
    assert torch.equal(ours, theirs)
    assert_same(read_component(tmp_path, "text_encoder"), found)


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("feed_forward_proj", "gated-silu", "'relu' or 'gated-gelu'"),
        ("relative_attention_num_buckets", 64, "it must be 32"),
        ("model_type", "umt5", "it must be 't5'"),
    ],
)
def test_other_structures_are_refused(key: str, value: Any, choices: str, folder: Path):
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    with pytest.raises(UserError, match=f"{key} = {value!r} in text_encoder/config.json is not supported") as error:
        ALL_FORMATS["text_encoder"].from_config(config, "text_encoder/config.json")
    assert choices in str(error.value)


def test_sums_are_in_float32():
    """Residuals and norms, whatever the type of the arithmetic: in bfloat16 each of 24 sums would round the large ones.

    They are so large in v1.1 that float16 has no numbers for them.
    """
    config = T5Config(400, 32, 12, 4, 8, 64)
    params: Any = {"params": drawn(conversion.shapes(config))}
    params["params"]["token_embedding"]["embedding"] *= 1000
    ids = tokens((11, 5), 16) % 400
    exact, half = (jax.jit(T5Encoder(config, dtype).apply)(params, ids, ids != 0) for dtype in ("float32", "bfloat16"))
    assert half.dtype == jnp.bfloat16
    assert np.abs(exact - half.astype(jnp.float32)).mean() < 0.002 * np.abs(exact).mean()


def test_first_weights_are_those_of_t5():
    """Standard deviations by transformers' rule, which scales queries where others scale scores."""
    config = T5Config(400, 64, 1, 4, 16, 256)
    found = flatten(jax.jit(T5Encoder(config).init)(jax.random.key(0), tokens((4,), 8))["params"])
    d, inner = config.width, config.heads * config.head_size
    wanted = {
        "token_embedding/embedding": 1.0,
        "relative_attention_bias/embedding": d**-0.5,
        "layers_0/self_attn/to_q/kernel": (d * config.head_size) ** -0.5,
        "layers_0/self_attn/to_k/kernel": d**-0.5,
        "layers_0/self_attn/to_out/kernel": inner**-0.5,
        "layers_0/ff/wi_0/kernel": d**-0.5,
        "layers_0/ff/wo/kernel": config.feed_forward**-0.5,
    }
    for name, deviation in wanted.items():
        assert 0.85 < found[name].std() / deviation < 1.15, name
