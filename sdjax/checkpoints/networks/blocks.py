"""Blocks that several networks share: their keys, as diffusers and transformers store them, and the original ones."""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.checkpoints.mapping import KeyMapping, Modules, at, below, conv, layer, norm

RESBLOCK = (
    *norm("norm1"),
    *conv("conv1"),
    *layer("time_emb_proj"),
    *norm("norm2"),
    *conv("conv2"),
    *conv("conv_shortcut"),
)
ATTENTION = (*layer("to_q"), *layer("to_k"), *layer("to_v"), *layer("to_out", "to_out.0"))
TRANSFORMER_BLOCK = (
    *norm("norm1"),
    *at("attn1", "attn1", ATTENTION),
    *norm("norm2"),
    *at("attn2", "attn2", ATTENTION),
    *norm("norm3"),
    *layer("ff/proj_in", "ff.net.0.proj"),
    *layer("ff/proj_out", "ff.net.2"),
)
EMBEDDING_MLP = (*layer("linear_1"), *layer("linear_2"), *layer("cond_proj"))
ATTENTION_BLOCK = (
    *norm("group_norm"),
    *(KeyMapping(f"attention/{row.ours}", row.theirs, row.kind) for row in ATTENTION),
)
# What diffusers called the attention's layers before 0.17; the published SD 1, SD 2 and LDM folders still say so.
ATTENTION_ALIASES = tuple(
    (rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
# Of a transformer, as CLIP has it.
TRANSFORMER_LAYER = (
    *norm("layer_norm1"),
    *layer("self_attn/to_q", "self_attn.q_proj"),
    *layer("self_attn/to_k", "self_attn.k_proj"),
    *layer("self_attn/to_v", "self_attn.v_proj"),
    *layer("self_attn/to_out", "self_attn.out_proj"),
    *norm("layer_norm2"),
    *layer("fc1", "mlp.fc1"),
    *layer("fc2", "mlp.fc2"),
)

ORIGINAL_RESBLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ORIGINAL_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_modules(attends: Sequence[bool], layers: int, attention: Modules | None = None) -> Modules:
    """The original name of every module of a UNet (CompVis/latent-diffusion openaimodel.py).

    Args:
        attends: whether each level, the finest first, has attention; it shifts the number of the upsampler.
        layers: residual blocks a level on the way down.
        attention: the names within attention, where they are not diffusers'.
    """
    levels, modules = len(attends), dict(ORIGINAL_ENDS)

    def add(theirs: str, ours: str, attends: bool = True) -> None:
        modules.update(below(theirs.format("resnets"), f"{ours}.0", ORIGINAL_RESBLOCK))
        if attends:
            name = theirs.format("attentions")
            modules.update({name: f"{ours}.1"} if attention is None else below(name, f"{ours}.1", attention))

    add("mid_block.{}.0", "middle_block")
    modules |= below("mid_block.resnets.1", "middle_block.2", ORIGINAL_RESBLOCK)
    for i in range(levels):
        for j in range(layers):
            add(f"down_blocks.{i}.{{}}.{j}", f"input_blocks.{1 + i * (layers + 1) + j}", attends[i])
        for j in range(layers + 1):
            add(f"up_blocks.{i}.{{}}.{j}", f"output_blocks.{i * (layers + 1) + j}", attends[levels - 1 - i])
        down = f"input_blocks.{(i + 1) * (layers + 1)}.0"
        up = f"output_blocks.{i * (layers + 1) + layers}.{1 + attends[levels - 1 - i]}"
        for theirs, ours, conv_name in (("down", down, "op"), ("up", up, "conv")):
            sampler = f"{theirs}_blocks.{i}.{theirs}samplers.0"
            modules |= below(sampler, ours, ORIGINAL_RESBLOCK | {"conv": conv_name})
    return modules
