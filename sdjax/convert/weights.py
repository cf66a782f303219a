"""Where the weights of a network are: one file or shards, of one precision or another, safetensors before pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sdjax.convert.files import Writable, read_metadata, read_safetensors, read_sharded
from sdjax.convert.pickles import SUFFIXES, read_pickle
from sdjax.core.errors import UserError

PICKLED = {"model": "pytorch_model"}  # transformers gives its pickles another name


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by key; each is read when it is made an array.
        facts: what the file says of itself, e.g. {"modelspec.prediction_type": "v"} or {"global_step": "875000"}.
        path: the file.
    """

    tensors: Mapping[str, Writable]
    facts: Mapping[str, str]
    path: Path


Source: TypeAlias = str | Path | Weights
"""A file's path, or what was read of it."""


def read_file(source: Source) -> Weights:
    """The tensors of a `.safetensors` file, or of a pickle through torch's restricted loader; not read a second time.

    Raises:
        UserError: the file is missing, corrupt, of another kind, or a pickle where torch is not installed.
    """
    if isinstance(source, Weights):
        return source
    path = Path(source)
    if path.suffix == ".safetensors":
        return Weights(read_safetensors(path), read_metadata(path), path)
    if path.suffix in SUFFIXES:
        return Weights(*read_pickle(path), path)
    raise UserError(f"{path} is none of the files that are read: .safetensors, {', '.join(SUFFIXES)}")


def candidates(stem: str, variant: str | None) -> Iterator[str]:
    """Names that a component's weights may have, the best first: files, and indices (`....json`) of shards.

    The file of the variant asked for comes first, then the plain one, then the half-precision one; pickles only where
    there is no safetensors file.
    """
    infixes = dict.fromkeys((*((f".{variant}",) if variant else ()), "", ".fp16"))
    for name, suffix in ((stem, "safetensors"), (PICKLED.get(stem, stem), "bin")):
        for infix in infixes:
            yield f"{name}{infix}.{suffix}"
            yield f"{name}.{suffix}.index{infix}.json"
            yield f"{name}{infix}.{suffix}.index.json"


def find_weights(folder: Path, stem: str, variant: str | None) -> Mapping[str, Writable]:
    """The tensors of a component's folder, of the first of its `candidates` that is there.

    Raises:
        UserError: there is none, or it is corrupt.
    """
    found = next((folder / name for name in candidates(stem, variant) if (folder / name).exists()), None)
    if found is None:
        raise UserError(f"{folder} holds no {stem}.safetensors, {stem}.fp16.safetensors, index of shards or .bin file")
    if found.suffix == ".json":
        return read_sharded(found, lambda path: read_file(path).tensors)
    return read_file(found).tensors
