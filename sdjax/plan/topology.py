"""The devices that a program is compiled for, which need not be there."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sdjax.core.errors import UserError
from sdjax.plan.chips import Chip, chip_of

# How many dimensions a slice has, and how libtpu is asked for chips of which each is one device.
GENERATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "v4": (3, {"chip_config_name": "megacore"}),
    "v5e": (2, {}),
    "v5p": (3, {}),
    "v6e": (2, {}),
}
HOST = 2  # chips of a host along the first two dimensions; smaller slices are parts of a host
UNDERSTOOD = f"a TPU slice ({', '.join(GENERATIONS)}) such as v5e:4x4 or v5p:2x2x2, cpu:N, or local"
INSTALL = "pip install -r requirements-tpu.txt"


class Target(NamedTuple):
    """Target of a compilation.

    Attributes:
        name: as the user wrote it.
        platform: "tpu", "gpu" or "cpu".
        devices: whose number the mesh must have.
        chip: what one of them can do.
    """

    name: str
    platform: str
    devices: Sequence[Any]
    chip: Chip

    @property
    def kind(self) -> str:
        """The name that JAX has for such a device."""
        return self.devices[0].device_kind


def find_target(text: str) -> Target:
    """The devices of a topology; it must be called before JAX has looked for any of its own.

    Args:
        text: `UNDERSTOOD`.

    Raises:
        UserError: it is none of these, no such slice exists, or libtpu is not installed.
    """
    kind, _, size = text.partition(":")
    if text == "local":
        return _target(text, jax.devices())
    if kind == "cpu":
        return _target(text, _virtual(size, text))
    if kind in GENERATIONS:
        return _target(text, _slice(kind, size, text))
    raise UserError(f"unknown topology {text!r} in --topology; it is {UNDERSTOOD}")


def _target(text: str, devices: Sequence[Any]) -> Target:
    return Target(text, devices[0].platform, devices, chip_of(devices[0].device_kind))


def _virtual(size: str, text: str) -> Sequence[Any]:
    """So many devices that are all this machine's CPU."""
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"--topology {text}: cpu:N wants a number of devices, e.g. cpu:4")
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", int(size))
    devices = jax.devices()
    if len(devices) < int(size):
        raise UserError(f"--topology {text}: XLA_FLAGS allows {len(devices)} CPU devices; leave that flag out")
    return devices[: int(size)]


def _slice(generation: str, size: str, text: str) -> Sequence[Any]:
    dimensions, how = GENERATIONS[generation]
    if not re.fullmatch(r"\d+(x\d+)*", size) or size.count("x") != dimensions - 1:
        example = "x".join(["2"] * (dimensions - 1) + ["4"])
        raise UserError(
            f"--topology {text}: slices of {generation} have {dimensions} dimensions, e.g. {generation}:{example}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {text} needs TPU's compiler, libtpu, which is not installed: {INSTALL}")
    sides = [int(side) for side in size.split("x")]
    if any(side % HOST for side in sides[:2]):
        how = how | {"chips_per_host_bounds": (*sides, 1)[:3]}
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it asks the cloud which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no chip that others could miss
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=text, **how).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split("===")[0].split())
        raise UserError(f"--topology {text}: libtpu knows no such slice: {reason}") from error
