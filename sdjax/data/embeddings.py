"""Files of embeddings, e.g. CLIP's of an image's nearest neighbours."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError


def read_embeddings(path: Path, place: str) -> Float[np.ndarray, "k d"]:
    """Read a NumPy file of embeddings, as float32.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{place}: cannot read {path}: {error}") from error
    fits = isinstance(array, np.ndarray) and array.ndim == 2 and len(array) and array.dtype.kind == "f"
    if not fits or not np.isfinite(array).all():
        raise UserError(f"{place}: {path} holds no finite embeddings of shape [k, d]")
    return array.astype(np.float32)
