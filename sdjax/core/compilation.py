"""Compiling with the options that suit the platform, and compiled programs that outlive a process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from sdjax.core.caches import cache_folder, own_folder

# XLA gives a CPU's products and convolutions to YNNPACK by default (jaxlib 0.10); most of those of Stable Diffusion's
# UNet take longer there than in Eigen, which it replaced. Its sums are faster.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
}

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def jit(function: Callable[..., Any] | None = None, **how: Any) -> Callable[..., Any]:
    """`jax.jit` with `options`; the platform is looked up at the first call, so this may decorate a module's functions.

    It is for whole programs: JAX lets no function that is called inside another compiled one have options.
    """
    if function is None:
        return lambda decorated: jit(decorated, **how)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return jax.jit(function, compiler_options=options(), **how)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    vars(call)["compiled"] = compiled  # so that its programs can be counted
    return call


@functools.cache
def options() -> dict[str, str]:
    """XLA's options for this platform; none where this jaxlib does not know them, for they are experimental."""
    chosen = dict(OPTIONS.get(jax.default_backend(), {}))
    try:
        jax.jit(lambda: 0, compiler_options=chosen).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return chosen


def keep_compiled(folder: Path | None = None) -> Path | None:
    """Turns on JAX's persistent compilation cache, in a folder that nobody else may write: programs are run as read.

    Where the user chose a folder, by JAX's own variable, that one is kept.

    Args:
        folder: None for sdjax/compiled in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); it is made.

    Returns:
        The folder, or None if there is none that only this user may write; the log says why.
    """
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    folder = own_folder(folder or cache_folder("compiled"), "compiled programs")
    if folder is None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
