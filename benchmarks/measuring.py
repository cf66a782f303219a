"""Seconds, bytes, and where they were measured."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax

COMPILING = "/jax/core/compile/"  # JAX reports tracing, lowering and XLA's own compiling under it
Call = Callable[[], object]


class Times(NamedTuple):
    """Seconds of each repetition; `theirs` is empty where there was no comparison."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """The median of our time over theirs of the same repetition: below 1 ours is faster."""
        return median(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def seconds(call: Call) -> float:
    """Seconds of a call that waits for its result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(ours: Call, theirs: Call | None, repetitions: int) -> Times:
    """Ours, theirs, ours, theirs ..., so that whatever else the machine does slows both."""
    times = Times([], [])
    for _ in range(repetitions):
        times.ours.append(seconds(ours))
        if theirs is not None:
            times.theirs.append(seconds(theirs))
    return times


@contextlib.contextmanager
def compile_seconds() -> Iterator[dict[str, float]]:
    """Record compilations in this context, by the function's name: seconds of tracing, lowering and XLA together."""
    spent: dict[str, float] = defaultdict(float)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(COMPILING) and "fun_name" in kwargs:
            spent[str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")")] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def peak_memory() -> tuple[float, str]:
    """The most GiB in use so far, and of what: this process's first device where it counts, else the process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 2**30, "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "process"


def device_name(devices: Sequence[Any]) -> str:
    """The accelerators, or the processor and how many of its cores this process may use."""
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    virtual = f"{len(devices)} virtual devices on " if len(devices) > 1 else ""
    return f"{virtual}{len(os.sched_getaffinity(0))} cores of {name}"


def versions(packages: tuple[str, ...]) -> str:
    """Those of the packages that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def commit() -> str:
    """The commit of this source, with "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
