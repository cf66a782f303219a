"""Work of Flax's and of Python's that tests would repeat thousands of times, done once.

- Flax compares the shape of each parameter that it is given with what the parameter's initialiser makes, and traces the
  initialiser for that: once for each initialiser and shape is enough.
- A worker holds millions of objects that never die, which Python's collector would look through again and again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import flax
import jax

OBJECTS = 100_000  # so many more must have been made than have died before the collector looks for cycles


def begin() -> None:
    """Once in a process that runs tests, before the first of them."""
    flax.core.scope.jax = Remembering()
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
