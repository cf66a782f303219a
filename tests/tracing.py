"""Work of Flax's and of Python's that tests would repeat thousands of times, done once.

- Flax compares the shape of each parameter that it is given with what the parameter's initialiser makes, and traces the
  initialiser for that: once for each initialiser and shape is enough.
- The shapes of a network's parameters come from tracing its `init`. Many tests compare with those of the published
  sizes: they are kept beside the compiled programs, under a name made of the network and of the code that it is.
- A worker holds millions of objects that never die, which Python's collector would look through again and again.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax

import sdjax
from sdjax.checkpoints import mapping

OBJECTS = 100_000  # so many more must have been made than have died before the collector looks for cycles


def begin(folder: Path) -> None:
    """Once in a process that runs tests, before the first of them; `folder` is that of the compiled programs."""
    flax.core.scope.jax = Remembering()
    mapping.traced = kept(mapping.traced, folder)
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS, 20, 20)


class Remembering:
    """JAX as Flax's scopes see it, but that the shapes which an initialiser makes are computed once."""

    def __init__(self) -> None:
        self.shapes: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def eval_shape(self, function: Callable[..., Any], *args: Any) -> Any:
        """A function without arguments is told from others by what it closes over."""
        closed = tuple(repr(cell.cell_contents) for cell in function.__closure__ or ())
        initialisers = tuple(cell.cell_contents for cell in function.__closure__ or () if callable(cell.cell_contents))
        if args or not initialisers:
            return jax.eval_shape(function, *args)
        key = (function.__code__, closed, initialisers)  # these live as long as the key: no other takes their address
        if key not in self.shapes:
            self.shapes[key] = jax.eval_shape(function)
        return self.shapes[key]


def kept(traced: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`traced`, whose results outlive the process."""

    @functools.wraps(traced)
    def found(init: Callable[..., Any], *inputs: Any) -> dict[str, Any]:
        specs = jax.tree.map(lambda leaf: (jax.numpy.shape(leaf), str(jax.numpy.asarray(leaf).dtype)), inputs)
        network = f"{code()} {init.__self__!r} {specs}"
        file = folder / f"shapes-{hashlib.sha256(network.encode()).hexdigest()[:24]}.pickle"
        if file.exists():
            return pickle.loads(file.read_bytes())
        shapes = traced(init, *inputs)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_bytes(pickle.dumps(shapes))
        beside.replace(file)
        return shapes

    return found


@functools.cache
def code() -> str:
    """A digest of what decides a network's shapes: the source of modules and kernels, and the libraries' versions."""
    root = Path(sdjax.__file__).parent
    files = [file for room in ("core", "ops", "models") for file in sorted((root / room).glob("*.py"))]
    versions = f"{jax.__version__} {flax.__version__}".encode()
    return hashlib.sha256(b"".join(map(Path.read_bytes, files)) + versions).hexdigest()
