"""Where the weights of a network are: one file or shards, of one precision or another, safetensors before pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sdjax.convert.files import Writable, read_metadata, read_safetensors, read_sharded
from sdjax.convert.pickles import SUFFIXES, read_pickle
from sdjax.core.errors import UserError

PICKLED = {"model": "pytorch_model"}  # transformers gives its pickles another name


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by key; each is read when it is made an array.
        facts: what the file says of itself, e.g. {"modelspec.prediction_type": "v"} or {"global_step": "875000"}.
    """

    tensors: Mapping[str, Writable]
    facts: Mapping[str, str]


def read_file(path: str | Path) -> Weights:
    """The tensors of a `.safetensors` file, or of a pickle through torch's restricted loader.

    Raises:
        UserError: the file is missing, corrupt, of another kind, or a pickle where torch is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Weights(read_safetensors(path), read_metadata(path))
    if path.suffix in SUFFIXES:
        return Weights(*read_pickle(path))
    raise UserError(f"{path} is none of the files that are read: .safetensors, {', '.join(SUFFIXES)}")


def find_weights(folder: Path, stem: str, variant: str | None) -> Mapping[str, Writable]:
    """The tensors of a component's folder.

    The file of the variant asked for comes first, then the plain one, then the half-precision one, each whole or in
    shards; pickles only where there is no safetensors file.

    Raises:
        UserError: there is none, or it is corrupt.
    """
    infixes = dict.fromkeys((*((f".{variant}",) if variant else ()), "", ".fp16"))
    for name, suffix in ((stem, "safetensors"), (PICKLED.get(stem, stem), "bin")):
        for infix in infixes:
            if (folder / f"{name}{infix}.{suffix}").exists():
                return read_file(folder / f"{name}{infix}.{suffix}").tensors
            for index in (f"{name}.{suffix}.index{infix}.json", f"{name}{infix}.{suffix}.index.json"):
                if (folder / index).exists():
                    return read_sharded(folder / index, lambda path: read_file(path).tensors)
    raise UserError(f"{folder} holds no {stem}.safetensors, {stem}.fp16.safetensors, index of shards or .bin file")
