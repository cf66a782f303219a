"""What tests hand to the processes that they start."""

from __future__ import annotations

import os


def devices(count: int) -> str:
    """XLA_FLAGS of this process, and so many virtual devices: a child compiles as hastily as its parent."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
