"""Keys of files of LoRA: a layer's name, and what a tensor is to the layer."""

from __future__ import annotations

import re

# diffusers before 0.20 named an attention's processor, and layers of a text encoder as the UNet's.
ALIASES = (
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.processor\.(to_[qkv])_lora\.", r".\1.lora."),
    (r"\.self_attn\.to_out_lora\.", ".self_attn.out_proj.lora."),
    (r"\.self_attn\.to_([qkv])_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.(lora_[AB]|lora_magnitude_vector)\.[A-Za-z]\w*\.weight$", r".\1.weight"),  # peft in memory names its adapters
)
ROLES = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"), "up"),
    "lora_mid.weight": "mid",
    **dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude"),
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    **{name: name for name in ("alpha", "scale", "dora_scale", "on_input", "diff", "diff_b", "w_norm", "b_norm")},
    "weight": "weight",  # IA3's
}
KINDS = (
    ({"down", "up"}, {"mid", "magnitude", "dora_scale"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2", "dora_scale"}),
    ({"lokr_w1", "lokr_w2"}, {"dora_scale"}),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "dora_scale"}),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"lokr_t1", "dora_scale"}),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t1", "lokr_t2", "dora_scale"}),
    ({"weight", "on_input"}, set()),
    ({"diff"}, set()),
    ({"w_norm"}, set()),
    (set(), set()),  # a difference of the bias alone
)
"""Roles that a layer's tensors of each kind have: those it must have, and those it may have beside `COMMON`."""
COMMON = {"alpha", "scale", "diff_b", "b_norm"}


def split(key: str) -> tuple[str, str] | None:
    """A layer's name as the file spells it and the role of a tensor, e.g. "down"; None where the key is no LoRA's."""
    for pattern, replacement in ALIASES:
        key = re.sub(pattern, replacement, key)
    parts = key.split(".")
    for count in (3, 2, 1):  # the longest ending counts: "weight" ends many
        ending = ".".join(parts[-count:])
        if len(parts) > count and ending in ROLES:
            return ".".join(parts[:-count]), ROLES[ending]
    return None


def is_whole(roles: set[str]) -> bool:
    """Tell whether a layer's tensors are all of one kind, and all that the kind needs."""
    own = roles - COMMON
    return bool(roles - {"alpha", "scale"}) and any(need <= own <= need | may for need, may in KINDS)
