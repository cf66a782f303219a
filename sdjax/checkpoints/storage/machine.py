"""The operations of pickles that files of tensors need, on data alone: nothing that a file names is imported or called.

A pickle is a program for a stack machine (the comments of Python's pickletools), which can call whatever Python can
import. `torch.save` uses little of that. This machine knows those operations; a name is a `Name`, and in place of calls
there are the constructors that it is given. Whatever else a file asks for is refused by name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
    *("BINBYTES", "SHORT_BINBYTES"),
}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
MAX_INTEGER = 2**63
SHOWN = 80


class Name(NamedTuple):
    """A class or a function that a pickle names, e.g. "torch.FloatStorage"."""

    name: str

    def __str__(self) -> str:
        return self.name[:SHOWN]


Constructors = Mapping[str, Callable[..., Any]]


def run(file: BinaryIO, constructors: Constructors, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of the pickle at the file's place, which is then behind it.

    Args:
        constructors: by name, what is made in place of a call.
        persistent: makes a value of what the pickle keeps outside of itself.

    Raises:
        ValueError, TypeError, IndexError, KeyError: it is no pickle, or asks for more than there is here.
    """
    machine = _Machine(constructors, persistent)
    for operation, argument, _ in pickletools.genops(file):
        machine.step(operation.name, argument)
    (value,) = machine.stack
    return value


class _Machine:
    def __init__(self, constructors: Constructors, persistent: Callable[[Any], Any] | None) -> None:
        self.constructors, self.persistent = constructors, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stack below each mark."""
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One operation."""
        if name in LITERALS:
            self.stack.append(_bounded(argument))
        elif name in PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self.memo[argument])
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self.stack.append(tuple(self._taken(TUPLES[name])))
        elif name not in ("PROTO", "FRAME", "STOP"):
            operation = getattr(self, f"_{name.lower()}", None)
            if operation is None:
                raise ValueError(f"it has the operation {name}")
            operation(*(() if argument is None else (argument,)))

    def _taken(self, count: int) -> list[Any]:
        """The topmost values."""
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _marked(self) -> list[Any]:
        """The values above the last mark."""
        marked, self.stack = self.stack, self.below.pop()
        return marked

    def _mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _tuple(self) -> None:
        marked = self._marked()  # which changes the stack
        self.stack.append(tuple(marked))

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _global(self, said: str) -> None:
        self.stack.append(Name(said.replace(" ", ".", 1)))

    def _stack_global(self) -> None:
        self.stack.append(Name(".".join(self._taken(2))))

    def _binpersid(self) -> None:
        (said,) = self._taken(1)
        if self.persistent is None:
            raise ValueError("it keeps values outside of itself")
        self.stack.append(self.persistent(said))

    def _reduce(self) -> None:
        called, arguments = self._taken(2)
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise TypeError("it calls what is no function")
        if called.name not in self.constructors:
            raise ValueError(f"it would run {called}")
        self.stack.append(self.constructors[called.name](*arguments))

    _newobj = _reduce

    def _build(self) -> None:
        made, state = self._taken(2)
        if not isinstance(made, dict | np.dtype):
            raise ValueError(f"it would set the state of {made if isinstance(made, Name) else type(made).__name__}")
        if isinstance(made, dict) and isinstance(state, dict):
            made.update(as_dict(state.get("_parameters", {}).items()))  # of a module; others' attributes are not read
        self.stack.append(made)

    def _append(self) -> None:
        self._extended(self._taken(1))

    def _appends(self) -> None:
        self._extended(self._marked())

    def _extended(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("it appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        self._set(self._taken(2))

    def _setitems(self) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise TypeError("it sets entries of what is no dictionary")
        self.stack[-1].update(as_dict(zip(items[::2], items[1::2], strict=True)))


def as_dict(pairs: Iterable[Any]) -> dict[Any, Any]:
    """A dictionary whose keys are text, integers or names: of other keys a file could choose equal hashes.

    Raises:
        TypeError, ValueError: these are no pairs, or have other keys.
    """
    entries = [(key, value) for key, value in pairs]
    if any(not isinstance(key, str | int | Name) for key, _ in entries):
        raise TypeError("it has keys that are neither text nor integers")
    return dict(entries)


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        raise ValueError("it has an integer of more than 64 bits")
    return value
