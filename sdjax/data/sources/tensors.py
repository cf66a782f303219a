"""Dictionaries of arrays as safetensors bytes, bfloat16 among them; the safetensors library checks what it reads."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from sdjax.core.errors import UserError

TYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = frozenset(dtype.name for dtype in TYPES.values())

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]


def pack(arrays: Arrays) -> bytes:
    """The arrays in the safetensors format.

    Raises:
        ValueError: a type is not one of `TYPES`.
    """
    # The library takes each array's address and length: what has gaps or another byte order would be other numbers.
    dense = {name: np.array(array, order="C", ndmin=0) for name, array in arrays.items()}
    for name, array in dense.items():
        if array.dtype.name not in NAMES or not array.dtype.isnative:
            raise ValueError(f"{name} has type {array.dtype}; what can be kept is {', '.join(sorted(NAMES))}")
    specs = {
        name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in dense.items()
    }
    return bytes(serialize(specs))


def unpack(data: bytes, place: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays in safetensors bytes; they take no more memory than the bytes do.

    Args:
        data: the whole of a file or record.
        place: what an error shall name.

    Raises:
        UserError: the bytes are not safetensors, or hold a type that is not one of `TYPES`.
    """
    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise UserError(f"cannot read {place}: {error}") from error
    for name, tensor in found:
        if tensor["dtype"] not in TYPES:
            raise UserError(f"cannot read {place}: {name!r} has type {tensor['dtype']}; choose of {', '.join(TYPES)}")
    return {name: np.frombuffer(t["data"], TYPES[t["dtype"]]).reshape(t["shape"]) for name, t in found}
