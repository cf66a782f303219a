"""LDM's conditional models assembled in PyTorch from exported folders, as references that share no code with sdjax.

UNets, first stages and DDIM are diffusers' own classes, which read the folders; the conditions follow the original
repository: CompVis/latent-diffusion, ldm/modules/encoders/modules.py and x_transformer.py (embedders),
ldm/models/diffusion/ddpm.py DiffusionWrapper (conditions as channels or as context), ddim.py (guidance),
scripts/inpaint.py and scripts/knn2img.py; CompVis/taming-transformers, taming/data/conditional_builder (layouts).

Everything is computed in float64. `noise`, [b h w c], is standard normal, of the latents' size; images are [b H W 3] in
[0, 1]. diffusers' UNet2DModel reads a folder only where all heads are equally wide (`attention_head_dim`), and its
sinusoids are as wide as its first level.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Box = Sequence[float]
FULL_CROP = (0.0, 0.0, 1.0, 1.0)


def sample_class(folder: Path, labels: Sequence[int], noise: np.ndarray, steps: int, scale: float) -> np.ndarray:
    """Images of classes (ClassEmbedder): one token of context; the embedding's last row is no class (cin256-v2)."""
    table = _tensors(folder, "class_embedder")["embedding.weight"]
    context = table[torch.tensor(labels)][:, None]
    null = table[torch.full((len(labels),), len(table) - 1)][:, None]
    return _guided(folder, noise, steps, scale, context, null)


def sample_layout(
    folder: Path, layouts: Sequence[Sequence[tuple[int, Box]]], noise: np.ndarray, steps: int, scale: float
) -> np.ndarray:
    """Images of layouts (BERTEmbedder without a tokenizer); guidance departs from a layout without objects.

    Args:
        layouts: of each image, its objects' class numbers and boxes [x, y, width, height] in shares of the sides.
    """
    config = _config(folder, "bert")
    length, vocabulary = config["max_position_embeddings"], config["vocab_size"]
    tokens = [layout_tokens(layout, (length - 2) // 3, vocabulary) for layout in layouts]
    empty = [layout_tokens((), (length - 2) // 3, vocabulary)] * len(layouts)
    return _guided(folder, noise, steps, scale, bert(folder, torch.tensor(tokens)), bert(folder, torch.tensor(empty)))


def sample_label_map(folder: Path, label_maps: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """Images of label maps, integers [b H W] (SpatialRescaler): channels behind those of the latents."""
    config = _config(folder, "rescaler")
    x = F.one_hot(torch.from_numpy(label_maps.astype(np.int64)), config["in_channels"])
    x = x.permute(0, 3, 1, 2).double()
    for _ in range(config["n_stages"]):
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    return _concatenated(folder, noise, steps, F.conv2d(x, _tensors(folder, "rescaler")["channel_mapper.weight"]))


def sample_inpainting(folder: Path, images: np.ndarray, masks: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """Images whose masked part is generated (scripts/inpaint.py).

    The masked image is encoded as it is, without the latents' scaling factor (`cond_stage_model.encode`); of a
    posterior its mode is taken (ddpm.py, `get_learned_conditioning`).

    Args:
        images: uint8 [b H W 3].
        masks: uint8 [b H W], 0 to 255; from half of it on a pixel is generated.
    """
    inside = (masks / 255.0 >= 0.5)[..., None].astype(np.float64)
    image, mask = _first(images / 255.0), _first(inside)
    vae = _first_stage(folder)
    with torch.no_grad():
        encoded = vae.encode((1.0 - mask) * image * 2.0 - 1.0)
    seen = encoded.latents if isinstance(vae, diffusers.VQModel) else encoded.latent_dist.mode()
    small = F.interpolate(mask * 2.0 - 1.0, size=seen.shape[-2:])
    generated = _concatenated(folder, noise, steps, torch.cat((seen, small), dim=1))
    return (1.0 - inside) * images / 255.0 + inside * generated


def sample_retrieval(folder: Path, neighbours: np.ndarray, noise: np.ndarray, steps: int, scale: float) -> np.ndarray:
    """Images of neighbours' embeddings, float [b k d] (scripts/knn2img.py); guidance departs from zeros."""
    context = torch.from_numpy(np.asarray(neighbours, np.float64))
    return _guided(folder, noise, steps, scale, context, torch.zeros_like(context))


def layout_tokens(layout: Sequence[tuple[int, Box]], objects: int, vocabulary: int, crop: Box = FULL_CROP) -> list[int]:
    """The tokens of a layout, as taming-transformers' ObjectsBoundingBoxConditionalBuilder with encode_crop has them.

    One vocabulary serves classes, points and padding: a class is its number, from 0 (below `no_object_classes`; the
    modifiers of crowds and occlusion, which come above, are not used here); the point (x, y) of a grid of s by s,
    s = floor(sqrt(vocabulary)), is round(y (s - 1)) s + round(x (s - 1)), with halves to the even neighbour; the last
    token is padding. Objects are triples of the class, the upper left and the lower right corner, in any order
    (training shuffles them); after the padding come the two corners of the crop. sdjax/data/text/box_tokens.py has this
    order: it is that of the published checkpoint.
    """
    none = vocabulary - 1
    triples = [(number, *_corners(box, vocabulary)) for number, box in layout]
    triples += [(none, none, none)] * (objects - len(triples))
    return [token for triple in triples for token in triple] + list(_corners(crop, vocabulary))


def _corners(box: Box, vocabulary: int) -> tuple[int, int]:
    x, y, width, height = box
    return _point(x, y, vocabulary), _point(x + width, y + height, vocabulary)


def _point(x: float, y: float, vocabulary: int) -> int:
    sections = int(math.sqrt(vocabulary))
    return round(y * (sections - 1)) * sections + round(x * (sections - 1))


def bert(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """States [b l d] of TransformerEmbedder: x-transformers' Encoder, pre-norm, learned positions, no mask.

    Its queries, keys and values have no biases, its GELU is exact, and a norm comes last.
    """
    config, w = _config(folder, "bert"), _tensors(folder, "bert")
    heads = config["encoder_attention_heads"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    x = w["model.embed_tokens.weight"][tokens] + w["model.embed_positions.weight"][: tokens.shape[1]]
    for i in range(config["encoder_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.self_attn_layer_norm")
        q, k, v = (split(h @ w[f"{layer}.self_attn.{name}_proj.weight"].T) for name in "qkv")
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        h = (weights @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(h, w[f"{layer}.self_attn.out_proj.weight"], w[f"{layer}.self_attn.out_proj.bias"])
        h = F.gelu(F.linear(norm(x, f"{layer}.final_layer_norm"), w[f"{layer}.fc1.weight"], w[f"{layer}.fc1.bias"]))
        x = x + F.linear(h, w[f"{layer}.fc2.weight"], w[f"{layer}.fc2.bias"])
    return norm(x, "model.layer_norm")


def _guided(
    folder: Path, noise: np.ndarray, steps: int, scale: float, context: torch.Tensor, null: torch.Tensor
) -> np.ndarray:
    """Sample by a UNet with cross-attention: e = e_null + scale (e_context - e_null)."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        base, towards = (unet(x, t, encoder_hidden_states=states).sample for states in (null, context))
        return base + scale * (towards - base)

    return _sampled(folder, noise, steps, network)


def _concatenated(folder: Path, noise: np.ndarray, steps: int, channels: torch.Tensor) -> np.ndarray:
    """Sample by a UNet that takes the condition's channels behind those of the latents."""
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float64)
    return _sampled(folder, noise, steps, lambda x, t: unet(torch.cat((x, channels), dim=1), t).sample)


def _sampled(folder: Path, noise: np.ndarray, steps: int, network: Network) -> np.ndarray:
    """DDIM without noise, and the decoder's images; what the UNet predicts is what the scheduler's config says."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    x, vae = _first(noise) * scheduler.init_noise_sigma, _first_stage(folder)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, eta=0.0).prev_sample
        decoded = vae.decode(x / vae.config.scaling_factor).sample
    return np.moveaxis(((decoded + 1.0) / 2.0).clamp(0.0, 1.0).numpy(), 1, -1)


def _first_stage(folder: Path) -> diffusers.VQModel | diffusers.AutoencoderKL:
    kind = getattr(diffusers, _config(folder, "vqvae")["_class_name"])
    return kind.from_pretrained(folder / "vqvae", torch_dtype=torch.float64)


def _config(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "config.json").read_text())


def _tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(folder / name / "model.safetensors").items()}


def _first(x: np.ndarray) -> torch.Tensor:
    """float64, channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x, np.float64), -1, 1)))
