"""Compiled programs as XLA prints them: instructions, the computations they call, and how often each of these runs."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLEE = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Shape(NamedTuple):
    """One array of an instruction's result.

    Attributes:
        on_chip: whether it lives in another memory than the device's main one (a TPU's vector memory, `S(1)`).
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def nbytes(self) -> int:
        """Without the padding of tiles."""
        bits = re.search(r"\d+", self.dtype)
        size = BYTES.get(self.dtype, int(bits[0]) / 8 if bits else 0)
        return math.ceil(math.prod(self.dims) * size)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def nbytes(self) -> int:
        """Shapes of the whole result."""
        return sum(shape.nbytes for shape in self.shapes)

    def callees(self) -> dict[str, str]:
        """Computations that this instruction runs, with the word that names each; `reduce` and its like run none."""
        found = {name: word for word, name in _CALLEE.findall(self.attributes)}
        branches = _BRANCHES.search(self.attributes)
        found |= dict.fromkeys(re.findall(r"[\w.\-]+", branches[1]), "branch") if branches else {}
        if self.opcode in ("async-update", "async-done"):  # their async-start has named it already
            return {}
        return {name: word for name, word in found.items() if word != "to_apply" or self.opcode == "call"}


class Computation(NamedTuple):
    """A named sequence of instructions."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The computation's result."""
        return next(i for i in self.instructions.values() if i.root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results are used."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    def parameter(self, index: int) -> Instruction | None:
        """The one of that number."""
        return next(
            (i for i in self.instructions.values() if i.opcode == "parameter" and i.operands == (str(index),)), None
        )


class Module:
    """A compiled program, one device's part of it.

    Attributes:
        computations: by name.
        entry: where it begins.
    """

    def __init__(self, text: str) -> None:
        """Args: `text` is what `compiled.as_text()` gives."""
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = {}
                self.computations[header[2]] = Computation(header[2], current)
                self.entry = header[2] if header[1] else self.entry
            elif _NAMED.match(line):
                instruction = parse_instruction(line)
                current[instruction.name] = instruction

    @cached_property
    def runs(self) -> dict[str, int]:
        """Number of runs of each computation in one call; a branch is assumed to be taken."""
        return self._walk(into_fusions=True)

    @cached_property
    def sequences(self) -> dict[str, int]:
        """The same without what is fused into one kernel: every instruction of these reads and writes memory."""
        return self._walk(into_fusions=False)

    @cached_property
    def unknown_loops(self) -> int:
        """Loops whose number of turns the text does not show; they are counted as one turn."""
        return sum(
            trips(self, self.computations[name], i) is None
            for name in self.runs
            for i in self.computations[name].instructions.values()
            if i.opcode == "while"
        )

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction, those of fused computations too, and how often it runs."""
        for name, count in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, count

    def _walk(self, into_fusions: bool) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)

        def visit(name: str, times: int) -> None:
            computation = self.computations.get(name)
            if computation is None:
                return
            counts[name] += times
            for instruction in computation.instructions.values():
                if instruction.opcode == "fusion" and not into_fusions:
                    continue
                callees = instruction.callees()
                turns = trips(self, computation, instruction) or 1 if callees and instruction.opcode == "while" else 1
                for callee in callees:
                    visit(callee, times * turns)

        visit(self.entry, 1)
        return dict(counts)


def parse_instruction(line: str) -> Instruction:
    """One line of a computation's text."""
    named = _NAMED.match(line)
    assert named is not None, line
    rest = line[named.end() :]
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    assert opcode is not None, line
    close = _balanced(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(part.strip() for part in inside.split(",") if part)
    return Instruction(named[2], opcode[1], parse_shapes(rest[:end]), operands, rest[close:], bool(named[1]))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a shape, which may be a tuple of them."""
    return tuple(
        Shape(
            dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), re.search(r"S\([1-9]", layout) is not None
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of a while instruction: XLA's note beside it, or else the constant in its condition.

    Args:
        computation: the one that holds the loop.

    Returns:
        None where neither shows it.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    words = {word: name for name, word in loop.callees().items()}
    condition = module.computations.get(words.get("condition", ""))
    if condition is None:
        return None
    compared = _comparison(module, condition)
    if compared is None:
        return None
    counter, limit, direction = compared
    stop = _number(condition, limit, computation, loop)
    start = _number(condition, counter, computation, loop)
    if stop is None or direction not in ("LT", "LE", "NE"):
        return None
    return stop - (start or 0) + (direction == "LE")


def _comparison(module: Module, condition: Computation) -> tuple[Instruction, Instruction, str] | None:
    """Counter and limit, as instructions of the condition, whose comparison may be fused."""
    root = condition.root
    inner, outer = root, condition.operands(root)
    if root.opcode == "fusion":
        fused = module.computations[next(iter(root.callees()))]
        inner = fused.root
        sources = fused.operands(inner)
        if not all(source.opcode in ("parameter", "constant") for source in sources):
            return None
        outer = [outer[int(s.operands[0])] if s.opcode == "parameter" else s for s in sources]
    direction = re.search(r"direction=(\w\w)", inner.attributes)
    return None if inner.opcode != "compare" or len(outer) != 2 or not direction else (outer[0], outer[1], direction[1])


def _number(condition: Computation, value: Instruction, computation: Computation, loop: Instruction) -> int | None:
    """A constant, or an element of the loop's state that is one where the loop begins."""
    if value.opcode == "constant":
        return int(value.operands[0]) if value.operands and value.operands[0].lstrip("-").isdecimal() else None
    index = re.search(r"index=(\d+)", value.attributes)
    if value.opcode == "copy":
        return _number(condition, condition.operands(value)[0], computation, loop)
    if value.opcode != "get-tuple-element" or index is None:
        return None
    state = computation.operands(loop)
    if not state or state[0].opcode != "tuple":
        return None
    first = computation.operands(state[0])[int(index[1])]
    while first.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        first = computation.operands(first)[0]
    return _number(computation, first, computation, loop) if first.opcode == "constant" else None


def _balanced(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"no closing parenthesis: {text}")
