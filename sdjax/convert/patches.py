"""Changes of a checkpoint: another autoencoder, words of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.convert.components import Checkpoint, Component, Patch
from sdjax.convert.folder import read_component
from sdjax.convert.hub import resolve
from sdjax.convert.pickles import read_pickle
from sdjax.convert.rules import Placer
from sdjax.convert.single_file import read_autoencoder_file
from sdjax.convert.tokenizers import check_text_encoders, tokenizers_of
from sdjax.convert.weights import read_file
from sdjax.core.errors import UserError
from sdjax.data.textual_inversion import fit, read_embedding
from sdjax.models.clip import extend_vocabulary


def replace_vae(source: str | Path, place: Placer | None = None) -> Patch:
    """Another autoencoder, in float32: of a file, or of a folder with its config.json, local or of the Hub.

    Raises:
        UserError: by the patch, where the source cannot be read, or the model diffuses pixels.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        own = checkpoint.components.get("vae")
        if own is None:
            raise UserError(f"vae {str(source)!r}: the model diffuses pixels, and has no autoencoder")
        return checkpoint.replace_component("vae", _read_vae(resolve(source), place, own))

    return patch


def add_embeddings(files: Sequence[str | Path]) -> Patch:
    """Words of textual inversions, in local `.safetensors`, `.pt` or `.bin` files, for text encoders and tokenizers.

    Raises:
        UserError: by the patch, where a file is missing or not for these text encoders, or a word is there already.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        names = check_text_encoders(checkpoint)
        parts = [checkpoint.components[name] for name in names]
        embeddings = [read_embedding(_tensors(Path(file)), Path(file).stem) for file in files]
        fitted = fit(embeddings, [part.config.width for part in parts])
        if again := sorted(set(fitted.counts) & set(checkpoint.placeholders)):
            raise UserError(f"there are two textual inversions for the word {again[0]!r}")
        extended = {}
        for name, part, tokenizer, rows in zip(names, parts, tokenizers_of(checkpoint), fitted.rows, strict=True):
            config, params = extend_vocabulary(part.config, part.params, rows, tokenizer.eos)
            extended[name] = dataclasses.replace(part, config=config, params=params)
        components, counts = {**checkpoint.components, **extended}, {**checkpoint.placeholders, **fitted.counts}
        return dataclasses.replace(checkpoint, components=components, placeholders=counts)

    return patch


def _read_vae(path: Path, place: Placer | None, own: Component) -> Component:
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        return read_component(folder, "vae", place=place)
    read = read_autoencoder_file(path, place=place)
    # A bare file does not say its scale; it takes the place of an autoencoder with the same latents.
    scale = own.config.scaling_factor
    return dataclasses.replace(read, config=dataclasses.replace(read.config, scaling_factor=scale))


def _tensors(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise UserError(f"there is no textual inversion {str(file)!r}")
    return read_file(file).tensors if file.suffix == ".safetensors" else read_pickle(file)[0]
