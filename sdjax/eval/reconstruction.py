"""Reconstruction quality of an autoencoder."""

from __future__ import annotations

import numpy as np

from sdjax.core.tree import Tree
from sdjax.data.sources.open import Source
from sdjax.eval.similarity import psnr
from sdjax.models.autoencoder import AnyAutoencoder
from sdjax.tasks.autoencoder import reconstruct


def reconstruction_psnr(model: AnyAutoencoder, params: Tree, images: Source, batch_size: int = 16) -> float:
    """The mean over all images of the PSNR of their reconstruction from the posterior's mean."""
    values: list[float] = []
    for start in range(0, len(images), batch_size):
        rows = range(start, min(start + batch_size, len(images)))
        batch = np.stack([images[i]["image"] for i in rows])
        # The last batch is filled up, so that one compilation serves all.
        padded = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)], mode="edge")
        values.extend(psnr(reconstruct(model, params, padded)[: len(batch)], batch / 255.0))
    return float(np.mean(values))
