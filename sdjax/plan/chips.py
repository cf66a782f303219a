"""Peaks of chips, as their makers publish them."""

from __future__ import annotations

from typing import NamedTuple

GIB, GIGA, TERA = 2**30, 1e9, 1e12


class Chip(NamedTuple):
    """One accelerator as JAX counts them; None where nothing is published or was looked up.

    Attributes:
        tflops: dense bfloat16 with float32 sums, in TFLOP/s.
        hbm: memory, in GiB.
        usable: of which a program may have, in GiB.
        bandwidth: of the memory, in GB/s.
        links: of all links to other chips, both directions together, in GB/s.
        axes: of the torus that the links make; 1 for a switch, which all links lead to.
    """

    tflops: float | None = None
    hbm: float | None = None
    usable: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    axes: int = 1

    @property
    def flops(self) -> float | None:
        """FLOP/s at the published peak."""
        return None if self.tflops is None else self.tflops * TERA

    @property
    def out(self) -> float | None:
        """Bytes/s that a chip sends along one axis: one direction of the links of that axis, to both neighbours."""
        return None if self.links is None else self.links * GIGA / 2 / self.axes


# By the beginning of JAX's device_kind; longer names first.
# TPU: cloud.google.com/tpu/docs, "System architecture" of v4, v5e, v5p and v6e: peak compute, HBM capacity and
# bandwidth, bidirectional inter-chip interconnect bandwidth, all per chip. v4's page has no link bandwidth: 6 links of
# 50 GB/s in each direction (Jouppi et al. 2023, "TPU v4", table 4). A device of v2 and v3 is half a chip. What a
# program may have of the HBM is what libtpu 0.0.42's compiler names as available when it refuses one.
# NVIDIA: the data sheets of H200, H100, A100, L40S, L4 (memory, its bandwidth, NVLink), and the architecture papers
# "NVIDIA Ada GPU" and "NVIDIA RTX Blackwell GPU", from memory: not looked up again, nor is v4's link.
CHIPS = {
    "NVIDIA H200": Chip(989.4, 141, 141, 4800, 900),
    "NVIDIA H100 PCIe": Chip(756.0, 80, 80, 2000, 600),
    "NVIDIA H100": Chip(989.4, 80, 80, 3350, 900),
    "NVIDIA A100-SXM4-40GB": Chip(312.0, 40, 40, 1555, 600),
    "NVIDIA A100": Chip(312.0, 80, 80, 2039, 600),
    "NVIDIA L40S": Chip(362.0),
    "NVIDIA L4": Chip(121.0),
    "NVIDIA GeForce RTX 4090": Chip(165.2),
    "NVIDIA GeForce RTX 5090": Chip(209.5),
    "TPU v2": Chip(22.5),
    "TPU v3": Chip(61.5),
    "TPU v4": Chip(275.0, 32, 30.75, 1200, 600, 3),
    "TPU v5 lite": Chip(197.0, 16, 15.75, 819, 400, 2),
    "TPU v5": Chip(459.0, 95, 95, 2765, 1200, 3),
    "TPU v6 lite": Chip(918.0, 32, 31.25, 1638, 800, 2),
}


def chip_of(device_kind: str) -> Chip:
    """The row of a kind of device; one that knows nothing where the table has none."""
    return next((chip for name, chip in CHIPS.items() if device_kind.startswith(name)), Chip())
