"""Features of images by Inception and CLIP, over all devices, cached on disk."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from tqdm import tqdm

from sdjax.checkpoints import metric_weights
from sdjax.core.caches import cache_folder, own_folder
from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write
from sdjax.data.sources.base import Images
from sdjax.data.transforms.images import square
from sdjax.models.conditioning import apply
from sdjax.models.inception import Inception
from sdjax.parallel.batches import local_mesh, put_batch
from sdjax.parallel.sharding import replicated

Arrays = dict[str, np.ndarray]
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # by which NumPy refuses a file

logger = logging.getLogger("sdjax")


def inception_features(images: Images, what: str, size: int | None, batch_size: int) -> Arrays:
    """`pooled`, `spatial` and `logits` of all images.

    Args:
        what: they are called on the progress bar.
        size: images are cut and resampled to this square first; None leaves each as it is.
        batch_size: images on each device at a time.

    Raises:
        UserError: Inception's weights are nowhere, or an image cannot be read.
    """
    params = metric_weights.load("inception")
    return _over(batches(images, size, batch_size * jax.local_device_count()), what, len(images), _seen, params)


def kept(key: str, make: Callable[[], Arrays], folder: Path | None = None) -> Arrays:
    """Result of `make`, read from disk where it was made before.

    Args:
        key: whatever it depends on; another key is another file.
        folder: default `cache_folder("features")`.
    """
    folder = own_folder(folder or cache_folder("features"), "features of images")
    if folder is None:
        return make()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except DAMAGED as error:
            logger.warning("%s is damaged, and is made anew: %s", path, error)
    made = make()
    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **made)  # pyright: ignore[reportArgumentType]
    except UserError as error:
        logger.warning("features are not kept: %s", error)
    return made


def identity(images: Images, name: str, size: int | None) -> str:
    """Cache key of image features: names, number and size, and the file of the weights."""
    names = hashlib.sha256("\n".join(map(images.id, range(len(images)))).encode()).hexdigest()
    path = metric_weights.find("inception")
    weights = "" if path is None else f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
    return f"{name} {len(images)} {names} {size} {weights}"


def batches(images: Images, size: int | None, rows: int) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
    """Images of one shape together, at most `rows`, in their order."""
    held: list[np.ndarray] = []
    for index in range(len(images)):
        image = images[index]["image"]
        image = image if size is None else square(image, size)
        if held and (len(held) == rows or held[0].shape != image.shape):
            yield np.stack(held)
            held = []
        held.append(image)
    yield np.stack(held)


def _over(
    given: Iterator[np.ndarray], what: str, count: int, see: Callable[[Mesh, Any, np.ndarray], Arrays], params: Any
) -> Arrays:
    mesh, found, most = local_mesh(), [], {}
    placed = jax.device_put(params, replicated(mesh))
    with jax.set_mesh(mesh), tqdm(total=count, desc=what, unit="picture") as bar:
        for images in given:
            # The last batch is filled up, so that one compilation serves all.
            rows = -(-len(images) // mesh.size) * mesh.size
            rows = most[images.shape[1:]] = max(rows, most.get(images.shape[1:], 0))
            padded = np.pad(images, [(0, rows - len(images)), (0, 0), (0, 0), (0, 0)], mode="edge")
            found.append({name: values[: len(images)] for name, values in see(mesh, placed, padded).items()})
            bar.update(len(images))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _seen(mesh: Mesh, params: Mapping[str, Any], images: np.ndarray) -> Arrays:
    features = _inception(params, put_batch({"images": images}, mesh)["images"])
    return {name: np.asarray(value) for name, value in features._asdict().items()}


@jax.jit
def _inception(params: Any, images: jax.Array) -> Any:
    return apply(Inception(), params, images)
