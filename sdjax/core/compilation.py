"""Compiling with the options that suit the platform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

# XLA gives a CPU's products and convolutions to YNNPACK by default (jaxlib 0.10); most of those of Stable Diffusion's
# UNet take longer there than in Eigen, which it replaced. Its sums are faster.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
}


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
