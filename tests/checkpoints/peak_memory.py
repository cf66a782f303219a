"""Reads a UNet from FOLDER in a process of its own and prints its weights' bytes and by how much the peak grew."""

from __future__ import annotations

import resource
import sys

from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.checkpoints.networks.unet import from_diffusers_config, shapes
from sdjax.core.tree import nbytes


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


folder, dtype = sys.argv[1:]
shapes(from_diffusers_config({}))  # what tracing a model takes is no part of loading one
before = peak()
component = read_component(folder, "unet", dtype)
print(nbytes(component.params), peak() - before)
