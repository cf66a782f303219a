"""How programs of tests are compiled, here and in the processes that they start."""

from __future__ import annotations

import os
import socket
from importlib.metadata import version

# Later versions do not know the flag, and end the process for it.
EMITTERS = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
# Most programs run once or twice, so optimising their machine code would take longer than it saves: these take two
# thirds of the time of compilation away.
HASTY = (
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
    f"{EMITTERS} --xla_cpu_parallel_codegen_split_count=1"
)

# Of the few programs that take longer to run so than to optimise: VGG's convolutions within a `cond` 30 times as long.
OPTIMISED = {"xla_backend_optimization_level": 1}


def devices(count: int) -> str:
    """XLA_FLAGS of this process, and so many virtual devices: a child compiles as hastily as its parent."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
