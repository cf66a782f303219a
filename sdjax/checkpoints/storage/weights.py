"""The weights of a network: which file or shards hold them, of which precision, safetensors before pickles.

A pickle (`.ckpt`, `.pt`, `.bin`) can run any code. It is read by nothing but torch's own restricted loader,
`torch.load(weights_only=True)`, which builds only tensors and plain containers; where torch is not installed, such
files are not read at all. It is looked for when a file asks for it, and needed for nothing else.
"""

from __future__ import annotations

import _codecs
import contextlib
import importlib
import importlib.util
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sdjax.checkpoints.mapping import Writable
from sdjax.checkpoints.storage.safetensors import open_safetensors, read_sharded
from sdjax.checkpoints.storage.signatures import format_of
from sdjax.core.errors import UserError

SAFETENSORS, SUFFIXES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
PICKLED = {"model": "pytorch_model"}  # transformers gives its pickles another name
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
DTYPES = {f"torch.{name}": np.dtype(getattr(jnp, name)) for name in FLOATS + INTEGERS}
DTYPES["torch.bool"] = np.dtype(np.bool_)


class Weights(NamedTuple):
    """A file's content.

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
    """The tensors of a safetensors file, or of a pickle through torch's restricted loader; not read a second time.

    Raises:
        UserError: the file is missing, corrupt, of another kind, or a pickle where torch is not installed.
    """
    if isinstance(source, Weights):
        return source
    path = Path(source)
    return Weights(*(open_safetensors if _is_safetensors(path) else read_pickle)(path), path)


def read_groups(path: Path) -> dict[str, Any]:
    """The tensors of a file by name, and of a pickle also its mappings, each by its name with the tensors in it.

    Raises:
        UserError: as `read_file`.
    """
    if _is_safetensors(path):
        return dict(open_safetensors(path)[0])
    content = _load(path)
    groups = {str(name): getattr(value, "_parameters", value) for name, value in content.items()}
    named = {name: _tensors(group, path) for name, group in groups.items() if isinstance(group, Mapping)}
    return _tensors(content, path) | {name: tensors for name, tensors in named.items() if tensors}


def _is_safetensors(path: Path) -> bool:
    """Tell the format by the file's beginning, and by its suffix where that is damaged."""
    if path.suffix not in (SAFETENSORS, *SUFFIXES):
        raise UserError(f"{path} is none of the files that are read: {SAFETENSORS}, {', '.join(SUFFIXES)}")
    found = format_of(path) or ("safetensors" if path.suffix == SAFETENSORS else "pickle")
    if found == "pickle" and path.suffix == SAFETENSORS:
        raise UserError(f"{path} is a pickle under the name of a safetensors file; call it {path.stem}.ckpt")
    return found == "safetensors"


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


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickle; where the file allows it, its bytes are read from disk when it becomes an array."""

    tensor: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[str(self.tensor.dtype)]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        torch = importlib.import_module("torch")
        # NumPy has no bfloat16 that torch knows of: the bytes are handed over
        raw = self.tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
        return raw.view(self.dtype).reshape(self.shape).astype(dtype or self.dtype, copy=False)


class _Unneeded:
    """Stands for the class of a training callback whose name the first published checkpoints mention."""


class _ParameterDict:
    """Stands for torch's module of that name, whose `_parameters` hold an old textual inversion's vectors."""


def read_pickle(path: str | Path) -> tuple[dict[str, PickledTensor], dict[str, str]]:
    """The tensors of a file by name, and its integers (`global_step`) as text.

    Raises:
        UserError: torch is not installed, or the file is missing, corrupt, or holds more than tensors and containers.
    """
    path = Path(path)
    content = _load(path)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise UserError(f"state_dict in {path} is a {type(state).__name__}, not tensors by name")
    tensors = _tensors(state, path)
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors, {str(key): str(value) for key, value in content.items() if type(value) is int}


def _tensors(content: Mapping[Any, Any], path: Path) -> dict[str, PickledTensor]:
    """The tensors among the values of a mapping."""
    named = {str(name): value for name, value in content.items() if hasattr(value, "data_ptr")}
    for name, tensor in named.items():
        if str(tensor.dtype) not in DTYPES or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
            raise UserError(f"{path} holds {name} as {tensor.dtype} ({tensor.layout}), which is not read")
    return {name: PickledTensor(tensor, name) for name, tensor in named.items()}


def _load(path: Path) -> Mapping[Any, Any]:
    """A pickle's mapping, through torch's restricted loader."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{path} is a pickle, which only PyTorch's restricted loader may read, and torch is not installed: "
            "install torch, or convert the file to .safetensors where it is"
        )
    torch = importlib.import_module("torch")
    try:
        with _names_of_published_files(torch):
            # torch's format since 1.6 is an archive, which can be mapped; an older one is read whole
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever an untrusted file makes a parser do
        reason = next((line.strip() for line in str(error).splitlines() if "Unsupported" in line), "")
        said = reason or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is corrupt or holds more than weights; it is not loaded: {said}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _names_of_published_files(torch: Any) -> AbstractContextManager[Any]:
    """Names beside torch's own: callbacks and NumPy's numbers in Stable Diffusion 1's files; none of them runs code."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch before 2.5
        return contextlib.nullcontext()
    scalar = np.float32(0).__reduce__()[0]
    places = ("pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    return torch.serialization.safe_globals(
        [
            *((_Unneeded, f"{place}.ModelCheckpoint") for place in places),
            (_ParameterDict, "torch.nn.modules.container.ParameterDict"),
            *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
            *((_codecs.encode, "_codecs.encode"), np.dtype),
            *(np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
        ]
    )
