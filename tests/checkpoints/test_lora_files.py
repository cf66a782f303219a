"""Files of LoRA in the names that programs give them, and what is wrong with a file in one line."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import save_file

from sdjax.checkpoints.lora.keys import ROLES, split
from sdjax.checkpoints.lora.names import blocks_of, layers_of, spellings
from sdjax.checkpoints.lora.reading import entry_of, hash_of, read_lora, scale_of
from sdjax.core.errors import UserError
from sdjax.models import clip, unet

L = clip.CLIPTextConfig()
G = clip.CLIPTextConfig(width=1280, layers=32, heads=20, feed_forward=5120, activation="gelu", projection_dim=1280)
BASES = {
    "sd1": {"unet": unet.VARIANTS["sd1"], "text_encoder": L},
    "sdxl": {"unet": unet.VARIANTS["sdxl"], "text_encoder": L, "text_encoder_2": G},
    "sdxl_refiner": {"unet": unet.VARIANTS["sdxl_refiner"], "text_encoder_2": G},
}
BLOCK = "unet/down_blocks_0_attentions_0/transformer_blocks_0"
LAYER = "text_encoder/layers_0"
# Keys as kohya-ss/sd-scripts, huggingface/diffusers and peft of several versions, and ComfyUI write them.
KEYS = {
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": f"{BLOCK}/attn1/to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight": f"{BLOCK}/ff/proj_in",
        "lora_unet_mid_block_attentions_0_proj_in.alpha": "unet/mid_block_attentions_0/proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": f"{LAYER}/fc1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.down.weight": f"{BLOCK}/attn1/to_out",
        "unet.down_blocks.0.resnets.0.conv1.lora_A.weight": "unet/down_blocks_0_resnets_0/conv1",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": f"{LAYER}/self_attn/to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_B.weight": f"{LAYER}/self_attn/to_out",
        "base_model.model.mid_block.resnets.1.conv2.lora_A.default.weight": "unet/mid_block_resnets_1/conv2",
        "base_model.model.text_model.encoder.layers.0.mlp.fc2.lora_A.weight": f"{LAYER}/fc2",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": f"{BLOCK}/attn1/to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight": (
            f"{BLOCK}/attn2/to_out"
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_k_lora.down.weight": f"{LAYER}/self_attn/to_k",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight": f"{BLOCK}/attn1/to_q",
        "lora_unet_time_embedding_linear_1.lokr_w1": "unet/time_embedding/linear_1",
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": "unet/down_blocks_0_resnets_0/norm1",
        "lora_te_text_model_final_layer_norm.b_norm": "text_encoder/final_layer_norm",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": (
            "unet/down_blocks_1_attentions_0/transformer_blocks_0/attn1/to_q"
        ),
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj.dora_scale": (
            "unet/mid_block_attentions_0/transformer_blocks_9/ff/proj_in"
        ),
        "lora_unet_output_blocks_2_2_conv.alpha": "unet/up_blocks_0_upsamplers_0/conv",
        "lora_unet_input_blocks_1_0_in_layers_2.lora_mid.weight": "unet/down_blocks_0_resnets_0/conv1",
        "lora_unet_input_blocks_3_0_op.hada_w1_a": "unet/down_blocks_0_downsamplers_0/conv",
        "lora_unet_label_emb_0_2.diff": "unet/add_embedding/linear_2",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (
            "unet/down_blocks_1_attentions_0/transformer_blocks_0/attn2/to_k"
        ),
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight": (
            "text_encoder/layers_3/self_attn/to_q"
        ),
        "lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_up.weight": "text_encoder_2/layers_31/fc2",
        "lora_te2_text_projection.alpha": "text_encoder_2/text_projection",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj.lora.up.weight": (
            "text_encoder_2/layers_0/self_attn/to_v"
        ),
    },
    "sdxl_refiner": {"lora_te_text_model_encoder_layers_31_mlp_fc1.alpha": "text_encoder_2/layers_31/fc1"},
}


@functools.cache
def layers(base: str):
    return layers_of(BASES[base])


@pytest.fixture(scope="module")
def tiny():
    text = zoo.clip_text(500, 499)
    return layers_of({"unet": zoo.UNETS["sd1"], "text_encoder": text})


@pytest.mark.parametrize(("base", "key"), [(base, key) for base, keys in KEYS.items() for key in keys])
def test_names(base, key):
    found = split(key)
    assert found is not None
    assert spellings(layers(base))[found[0].replace(".", "_")].path == KEYS[base][key]


def test_counts_of_kohyas_targets():
    """Layers of the transformers and of the text encoders, as kohya-ss/sd-scripts counts them."""
    counts = {"sd1": {"unet": 192, "text_encoder": 72}}
    counts["sdxl"] = {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}
    for base, expected in counts.items():
        dense = [layer for layer in layers(base).values() if "kernel" in layer.leaves]
        mine = [one for one in dense if "attentions" in one.theirs or "encoder.layers" in one.theirs]
        found = {part: sum(layer.component == part for layer in mine) for part in expected}
        assert found == expected


def test_blocks():
    """Those that attend are the ones that user interfaces weigh (sd-webui-lora-block-weight)."""
    for base, expected in {
        "sd1": "IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
        "sdxl": "IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    }.items():
        names, modules = blocks_of(layers(base))
        assert [n for n in names if any(names[b] == n and "att" in m for m, b in modules.items())] == expected.split()
        assert names[modules["time_embedding"]] == ""


STEM = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PATH = "unet/down_blocks_0_attentions_0/transformer_blocks_0/attn1/to_q"
FACTORS = {"lora_A.weight": torch.ones(4, 64), "lora_B.weight": torch.ones(64, 4)}


def written(path, tensors, **metadata):
    named = {
        name if name.startswith(("lora_unet", "lora_te", "x.")) else f"{STEM}.{name}": tensor
        for name, tensor in tensors.items()
    }
    save_file({name: tensor.clone() for name, tensor in named.items()}, path, metadata or None)
    return path


@pytest.mark.parametrize(
    ("config", "more", "scale"),
    [
        (None, {}, 1.0),  # diffusers' files say no alpha, which is the rank
        ({"r": 4, "lora_alpha": 2}, {}, 0.5),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, {}, 1.0),
        ({"r": 8, "lora_alpha": 2, "rank_pattern": {STEM[5:]: 4}, "alpha_pattern": {f"^{STEM[5:]}": 12}}, {}, 3.0),
        ({"r": 8, "lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 6, "attn2.to_q": 9}}, {}, 1.5),
        (None, {"alpha": torch.tensor(1.0)}, 0.25),
        (None, {"alpha": torch.tensor([1.0]), "scale": torch.tensor(7.0)}, 7.0),
    ],
)
def test_scale(config, more, scale, tiny, tmp_path):
    said = {} if config is None else {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    file = read_lora(written(tmp_path / "a.safetensors", {**FACTORS, **more}, **said), tiny)
    assert scale_of(file, tiny[PATH]) == scale


@pytest.mark.parametrize("alpha", [10**30, "2", None, [2], True])
def test_an_alpha_that_is_none(alpha, tiny, tmp_path):
    """Where peft's config says nothing that is a number, the alpha is the rank; true is one."""
    facts = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha, "unet.alpha_pattern": ["x"]})}
    file = read_lora(written(tmp_path / "a.safetensors", FACTORS, **facts), tiny)
    assert scale_of(file, tiny[PATH]) == (0.25 if alpha is True else 1.0)


@pytest.mark.parametrize("text", ["{", "[1]", '{"unet.r": NaN}'])
def test_hostile_metadata(text, tiny, tmp_path):
    path = written(tmp_path / "a.safetensors", FACTORS, lora_adapter_metadata=text)
    with pytest.raises(UserError, match=f"lora_adapter_metadata of {re.escape(str(path))}"):
        read_lora(path, tiny)


@pytest.mark.parametrize("seed", range(40))
def test_any_shapes(seed, tiny, tmp_path):
    """Factors of any kinds and shapes are read or refused."""
    rng = np.random.default_rng(seed)
    names = rng.choice([f"{name}.weight" for name in ("lora_down", "lora_up", "lora_mid")] + list(ROLES), 4)
    shapes = {str(name): rng.choice([1, 2, 64, 128], rng.integers(0, 6)).tolist() for name in names}
    need = [{}, {"lora_A.weight": [2, 64], "lora_B.weight": [64, 2]}, {"hada_w1_a": [64, 2]}][seed % 3]
    stored = {name: torch.ones(shape) for name, shape in {**shapes, **need}.items()}
    path = written(tmp_path / "a.safetensors", stored)
    with contextlib.suppress(UserError):
        entry_of(read_lora(path, tiny), tiny[PATH])


def test_peft_folder(tiny, tmp_path):
    """A folder of peft for one network, whose config stands beside."""
    stem = f"base_model.model.{STEM[5:]}"
    save_file({f"{stem}.{name}": tensor for name, tensor in FACTORS.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    file = read_lora(tmp_path, tiny)
    assert scale_of(file, tiny[PATH]) == 2.0
    assert list(file.layers) == [PATH]


def test_both_namings_in_one_file(tiny, tmp_path):
    """diffusers takes its own names."""
    other = {
        f"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{n}.weight": t
        for n, t in {"down": torch.zeros(4, 64), "up": torch.zeros(64, 4)}.items()
    }
    for tensors in ({**other, **FACTORS}, {**FACTORS, **other}):
        file = read_lora(written(tmp_path / "a.safetensors", tensors), tiny)
        assert entry_of(file, tiny[PATH])["down"].all()


def test_layers_that_the_model_lacks(tiny, tmp_path):
    more = {"x.lora_A.weight": torch.ones(1), "lora_te_text_model_encoder_layers_7_mlp_fc1.alpha": torch.ones(1)}
    file = read_lora(written(tmp_path / "a.safetensors", {**FACTORS, **more}), tiny)
    assert (file.matched, file.unmatched) == (
        "1 of 3 layers",
        ["lora_te_text_model_encoder_layers_7_mlp_fc1", "x"],
    )


NAN = {**FACTORS, "lora_B.weight": torch.full((64, 4), float("nan"))}
FAULTS = {
    "another base": ({**FACTORS, "lora_A.weight": torch.ones(4, 80)}, "is a LoRA for another base (sdxl_base_v1-0)"),
    "ranks": ({**FACTORS, "lora_A.weight": torch.ones(3, 64)}, "is a LoRA for another base"),
    "no rank": ({"lora_A.weight": torch.ones(0, 64), "lora_B.weight": torch.ones(64, 0)}, "another base"),
    "half a kind": ({"lora_A.weight": torch.ones(4, 64)}, "is no LoRA for this model"),
    "two kinds": ({**FACTORS, "hada_w1_a": torch.ones(4)}, "is no LoRA for this model"),
    "nothing": ({"x.lora_A.weight": torch.ones(2)}, "it names x; the model has unet/conv_in, "),
    "alpha": ({**FACTORS, "alpha": torch.tensor(float("inf"))}, "an alpha or a scale"),
    "values": (NAN, "not finite"),
    "twice": ({**FACTORS, "lora_down.weight": torch.ones(4, 64)}, "twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, tiny, tmp_path):
    tensors, message = FAULTS[fault]
    path = written(tmp_path / "a.safetensors", tensors, ss_base_model_version="sdxl_base_v1-0")
    with pytest.raises(UserError) as error:
        entry_of(read_lora(path, tiny), tiny[PATH])
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_hash(tmp_path):
    """SHA-256 of the tensors (A1111's AutoV3), or the one that the file's metadata say."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.tensor([1.0, 2.0])}, path)
    data = np.array([1, 2], np.float32).tobytes()

    assert hash_of(path) == hashlib.sha256(data).hexdigest()[:12]
    other = tmp_path / "b.safetensors"
    save_file({"a": torch.tensor([1.0, 2.0])}, other, {"sshs_model_hash": "ab" * 32})
    assert hash_of(other) == "ab" * 6
