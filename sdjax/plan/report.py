"""Plans as tables for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.core.files import write_text
from sdjax.plan.plans import Plan, PlannedProgram
from sdjax.plan.programs import Figures, Refused, gib
from sdjax.plan.roofline import ASSUMPTIONS
from sdjax.plan.search import Tried
from sdjax.plan.topology import Target

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
SUFFIXES = (".md", ".json")
Row = Sequence[str]


class Heading(NamedTuple):
    """Heading of a report: its title, the command that makes it, and the target of the compilation."""

    title: str
    command: str
    target: Target


def table(head: Row, rows: Sequence[Row]) -> str:
    """Markdown whose columns stand below one another as plain text, too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def plan_report(heading: Heading, plan: Plan) -> str:
    """All that is known of one plan, in Markdown."""
    known = [part for part in plan.parts if isinstance(part.result, Figures)]
    sections = [_head(heading), f"Mesh {plan.mesh}, {plan.images} images a batch. **{verdict(plan)}.**"]
    if plan.refused:
        refusal: Any = plan.refused.result
        sections.append(f"The compiler refused {plan.refused.name}:\n\n    {refusal.message}")
    if known:
        sections += [_section("Memory of each device, GiB", MEMORY, known), _section("Arithmetic", FLOPS, known)]
        sections += ["## Communication of each device\n\n" + _collectives(known), _time(plan, known)]
    return "\n\n".join([*sections, _assumed(heading, known)]) + "\n"


def search_report(heading: Heading, tried: Sequence[Tried], left: int) -> str:
    """Table in Markdown of the plans that fit, best first, then of those that do not."""
    good = sorted((t for t in tried if t.plan.fits is not False), key=lambda t: -(t.plan.speed or 0.0))
    bad = sorted((t for t in tried if t.plan.fits is False), key=lambda t: -(t.plan.free or float("-inf")))
    sections = [_head(heading)]
    if good:
        sections.append(
            "## Fits\n\n" + table(list(SEARCHED), [[show(t.plan) for show in SEARCHED.values()] for t in good])
        )
    if bad:
        rows = [[t.plan.mesh, str(t.plan.images), verdict(t.plan)] for t in bad]
        sections.append("## Does not fit\n\n" + table(["mesh", "batch", "by how much"], rows))
    sections.append(f"{len(tried)} combinations were compiled" + (f"; --limit left out {left} more." if left else "."))
    return "\n\n".join([*sections, _assumed(heading, [p for t in tried for p in t.plan.parts])]) + "\n"


def verdict(plan: Plan) -> str:
    """Verdict on a plan: fits or not, and by how much."""
    if plan.free is None:
        return "does not fit" if plan.refused else "nothing is published of these devices' memory"
    word = "fits" if plan.free >= 0 else "does not fit"
    return f"{word} by {gib(abs(plan.free)):.2f} GiB"


def as_json(heading: Heading, plans: Sequence[Plan]) -> str:
    """The same numbers: bytes, flops and seconds."""
    names = ("fits", "peak", "free", "seconds", "least", "speed", "utilisation")

    def plan_of(plan: Plan) -> dict[str, Any]:
        figures = {name: getattr(plan, name) for name in names}
        return {
            "mesh": plan.mesh,
            "images": plan.images,
            "devices": plan.devices,
            **figures,
            "programs": [_part(p) for p in plan.parts],
        }

    said = {"title": heading.title, "command": heading.command, "topology": heading.target.name}
    said |= {"device_kind": heading.target.kind, "versions": versions()}
    chip = heading.target.chip._asdict()
    return json.dumps(
        {**said, "chip": chip, "assumptions": ASSUMPTIONS, "plans": [plan_of(p) for p in plans]}, indent=1
    )


def write(path: Path, markdown: str, data: str) -> None:
    """Writes .md or .json, whichever the name ends with."""
    write_text(path, markdown if path.suffix == ".md" else data + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is compiled; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _part(part: PlannedProgram) -> dict[str, Any]:
    if isinstance(part.result, Refused):
        return {"name": part.name, "refused": part.result._asdict()}
    result = part.result
    memory = {**result.memory._asdict(), "peak": result.memory.peak}
    moved = {kind: each._asdict() for kind, each in result.moved.items()}
    own = {**result._asdict(), "memory": memory, "flops": result.flops._asdict(), "moved": moved}
    return {"name": part.name, "turns": part.turns, **own, "estimate": part.estimate and part.estimate._asdict()}


def _head(heading: Heading) -> str:
    target, chip = heading.target, heading.target.chip
    known = (
        "of which nothing is published here"
        if chip.hbm is None
        else (
            f"{chip.tflops:g} TFLOP/s in bfloat16, {chip.hbm:g} GiB ({chip.usable:g} for programs) at "
            f"{chip.bandwidth:g} GB/s, "
            f"links of {chip.links:g} GB/s in both directions over {chip.axes} {'axes' if chip.axes > 1 else 'axis'}"
        )
    )
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"# {heading.title}\n\n    {heading.command}\n\n"
        f"{len(target.devices)} x {target.kind} ({target.name}): each {known}. Compiled with {packages}."
    )


def _section(title: str, columns: dict[str, Callable[[Figures], str]], parts: Sequence[PlannedProgram]) -> str:
    rows = [
        [part.name, *(show(part.result) for show in columns.values())]
        for part in parts
        if isinstance(part.result, Figures)
    ]
    return f"## {title}\n\n{table(['program', *columns], rows)}"


def _collectives(parts: Sequence[PlannedProgram]) -> str:
    rows = [
        [part.name, kind, str(moved.count), f"{moved.nbytes / 1e6:.3f}"]
        for part in parts
        if isinstance(part.result, Figures)
        for kind, moved in part.result.moved.items()
    ]
    return table(["program", "collective", "calls", "MB sent"], rows) if rows else "None."


def _time(plan: Plan, parts: Sequence[PlannedProgram]) -> str:
    rows = [
        [
            part.name,
            str(part.turns),
            *(_milli(t) for t in part.estimate),
            part.estimate.bound,
            _milli(part.estimate.seconds),
        ]
        for part in parts
        if part.estimate is not None
    ]
    head = ["program", "turns", "arithmetic", "memory", "communication", "longest", "together"]
    text = "## Roofline estimate of a batch, ms\n\n" + table(head, rows)
    if plan.seconds is None or plan.utilisation is None or plan.speed is None or plan.least is None:
        return text
    return (
        f"{text}\n\n{plan.seconds:.4g} s a batch ({plan.least:.4g} s were everything overlapped), "
        f"{plan.speed:.4g} images/s, {plan.utilisation:.1%} of the peak of all devices (model flops)."
    )


def _assumed(heading: Heading, parts: Sequence[PlannedProgram]) -> str:
    lines = [f"- {line}" for line in ASSUMPTIONS]
    unknown = sum(part.result.unknown_loops for part in parts if isinstance(part.result, Figures))
    if unknown:
        lines.append(f"- {unknown} loops of unknown length are counted as one turn: work and communication are more.")
    if heading.target.platform == "cpu":
        lines.append("- Virtual CPU devices: memory and collectives are those of XLA's CPU compiler, not a TPU's.")
    return "## What this assumes\n\n" + "\n".join(lines)


def _milli(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


MEMORY: dict[str, Callable[[Figures], str]] = {
    "arguments": lambda f: f"{gib(f.memory.arguments):.3f}",
    "outputs": lambda f: f"{gib(f.memory.outputs):.3f}",
    "of these in place": lambda f: f"{gib(f.memory.aliased):.3f}",
    "temporaries": lambda f: f"{gib(f.memory.temporaries):.3f}",
    "beside it": lambda f: f"{gib(f.memory.beside):.3f}",
    "peak": lambda f: f"{gib(f.memory.peak):.3f}",
    "compiling, s": lambda f: f"{f.seconds:.1f}",
}
FLOPS: dict[str, Callable[[Figures], str]] = {
    "model, all devices, TFLOP": lambda f: f"{f.flops.model / 1e12:.4g}",
    "with recomputation": lambda f: f"{f.flops.traced / 1e12:.4g}",
    "compiled, a device": lambda f: f"{f.flops.device / 1e12:.4g}",
    "kernels that hide theirs": lambda f: str(f.flops.kernels),
    "XLA's own, loops once": lambda f: f"{f.flops.reported / 1e12:.4g}",
    "memory traffic, GB": lambda f: f"{f.traffic / 1e9:.4g}",
}
SEARCHED: dict[str, Callable[[Plan], str]] = {
    "mesh": lambda p: p.mesh,
    "batch": lambda p: str(p.images),
    "peak, GiB": lambda p: _number(p.peak and gib(p.peak), ".2f"),
    "free, GiB": lambda p: _number(p.free and gib(p.free), ".2f"),
    "s a batch": lambda p: _number(p.seconds, ".4g"),
    "pictures/s": lambda p: _number(p.speed, ".4g"),
    "of peak": lambda p: _number(p.utilisation, ".1%"),
}
