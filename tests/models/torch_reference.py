"""Small torch models with every parameter random, and the same parameters in our tree."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import torch

from sdjax.checkpoints.mapping import KeyTable, read
from sdjax.core.tree import Tree

# What writes into a residual stream. With a gain of 0.003 the streams' variance is near 1e-5, where a norm's epsilon
# (1e-5 here, 1e-6 there) decides the result; with 1 it hides.
WRITERS = re.compile(r"conv_in|conv2|conv_shortcut|proj_in|proj_out|to_out|ff\.net\.2|_embedding\.weight|out_proj|fc2")
GAINS = (1.0, 0.003)


def randomised(module: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Kernels of unit gain, norms around 1, biases around 0: none is left at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
        parameter.data = gain * value if WRITERS.search(name) else value
    return module.eval()


def translated(module: torch.nn.Module, table: KeyTable, shapes: Tree) -> dict[str, Any]:
    """The module's parameters as ours, float32."""
    return read(table, {name: tensor.numpy() for name, tensor in module.state_dict().items()}, shapes, np.float32, "")


def drawn(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of the given shapes, in a moment: kernels of unit gain, embeddings of unit variance, norms
    around 1, all else around 0."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        noise = rng.standard_normal(like.shape).astype(np.float32)
        if path[-1].key == "embedding":
            return noise
        if len(like.shape) > 1:
            return noise / np.float32(np.sqrt(np.prod(like.shape[:-1])))
        return 0.2 * noise + np.float32(path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)
