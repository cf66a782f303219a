"""Tensors under diffusers' keys renamed to the originals' by their own rules, written out again for the tests."""

from __future__ import annotations

import numpy as np


def unet2d_original(stored, config, new_order):
    """A UNet without cross-attention in guided-diffusion's naming, in the order in which its constructor works."""
    layers, levels = config.layers_per_block, len(config.channels)
    blocks = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    blocks |= {"class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0"}
    blocks |= {"conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    blocks |= {"mid_block.resnets.1": "middle_block.2"}
    number = 1
    for i in range(levels):
        for j in range(layers):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if i < levels - 1:
            blocks[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    number = 0
    for i in range(levels):
        for j in range(layers + 1):
            parts = [f"up_blocks.{i}.resnets.{j}"]
            if levels - 1 - i in config.attention_levels:
                parts.append(f"up_blocks.{i}.attentions.{j}")
            if j == layers and i < levels - 1:
                parts.append(f"up_blocks.{i}.upsamplers.0")
            blocks |= {part: f"output_blocks.{number}.{place}" for place, part in enumerate(parts)}
            number += 1
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection", "group_norm": "norm"}
    made = {}
    for module, block in blocks.items():
        rests = {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")}
        if any(rest.startswith("to_q") for rest in rests):
            level = -1 if "mid" in module else int(module.split(".")[1])
            heads = config.heads[::-1][level] if "up_" in module else config.heads[level]
            for kind in ("weight", "bias"):
                parts = [rests.pop(f"to_{letter}.{kind}") for letter in "qkv"]
                if new_order:
                    joint = np.concatenate(parts)
                else:
                    heads_of = [np.split(part, heads) for part in parts]
                    joint = np.concatenate([part for head in zip(*heads_of, strict=True) for part in head])
                made[f"{block}.qkv.{kind}"] = joint[:, :, None] if kind == "weight" else joint
                out = rests.pop(f"to_out.0.{kind}")
                made[f"{block}.proj_out.{kind}"] = out[:, :, None] if kind == "weight" else out
        for rest, value in rests.items():
            module_name, _, kind = rest.rpartition(".")
            # A resampling convolution is "op" on the way down, "conv" on the way up.
            if module_name == "conv":
                module_name = "op" if "down" in module else "conv"
            made[".".join(filter(None, (block, inner.get(module_name, module_name), kind)))] = value
    assert len(made) >= len(stored) - 4 * sum("to_q.weight" in key for key in stored)
    return made


def bert_original(stored, layers):
    """LDM's BERT in x-transformers' naming, which has two layers for each of diffusers'."""
    stored = dict(stored)
    original = {"to_logits.weight": np.zeros((50, 32), np.float32), "to_logits.bias": np.zeros(50, np.float32)}
    for i in range(layers):
        a, b = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        modules = {"self_attn_layer_norm": f"{a}.0", "final_layer_norm": f"{b}.0"}
        modules |= {f"self_attn.{x}_proj": f"{a}.1.to_{x}" for x in ("q", "k", "v", "out")}
        modules |= {"fc1": f"{b}.1.net.0.0", "fc2": f"{b}.1.net.2"}
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                if (key := f"model.layers.{i}.{theirs}.{kind}") in stored:
                    original[f"{ours}.{kind}"] = stored.pop(key)
    names = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb", "model.layer_norm": "norm"}
    for key, value in stored.items():
        module, _, kind = key.rpartition(".")
        original[f"{names[module]}.{kind}"] = value
    return original
