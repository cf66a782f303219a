"""Low-rank adaptation (LoRA; Hu et al. 2021) of networks whose modules know nothing of it.

Factors stand in the tree of parameters beside the kernel that they change, one entry a file or training run:

    {"to_q": {"kernel": [i, o], "lora": {"0": {"down": [i, r], "up": [r, o], "scale": []}}}}

| leaf | |
|---|---|
| down | [i, r] of a dense layer; [h, w, i, r] of a convolution, with `mid` [1, 1, i, r] |
| mid | [h, w, r, r], the core of a convolution's CP decomposition (LoCon) |
| up | [r, o] |
| scale | alpha / r times the strength: a scalar, or [b], one an image, where a network sees b * n rows |
| magnitude | [o], DoRA's length of every output's weights (Liu et al. 2024); its scale is a scalar |
| dropout | probability that a value between `down` and `up` is zero, where `with_dropout` put a `key` beside it |

`sdjax.models.conditioning.apply` adds them to what the dense and convolutional layers of any network return.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.prng import stream_below
from sdjax.core.tree import Params, Tree, merge, unflatten

LORA, DROPOUT = "lora", "dropout"
GAUSSIAN, KAIMING = INITS = ("gaussian", "kaiming")
FIXED = tuple(f"*/{LORA}/*/{leaf}" for leaf in ("scale", DROPOUT))
"""Leaves that never learn, as patterns of names."""

Factors = Mapping[str, Array]
"""One entry of a layer."""


class Adaptation(NamedTuple):
    """Sizes of fresh factors.

    Attributes:
        rank: of dense layers and 1x1 convolutions.
        alpha: the branch is scaled by alpha / rank; None is the rank.
        conv_rank: of larger convolutions; None is `rank`.
        conv_alpha: theirs; None is their rank.
        rslora: alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023).
        dora: every output's weights have a length of their own (Liu et al. 2024).
        dropout: between the factors (kohya-ss/sd-scripts).
        init: of `down`: "gaussian" with deviation 1 / rank (diffusers), "kaiming" within 1 / sqrt(inputs) (peft,
            kohya). `up` is zero.
    """

    rank: int = 4
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: str = GAUSSIAN


def layers_of(tree: Tree, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paths, e.g. "unet/conv_in", and parameters of the dense and convolutional layers in a tree."""
    if getattr(tree.get("kernel"), "ndim", 0) in (2, 4):
        yield path, tree
    for name, below in tree.items():
        if isinstance(below, Mapping) and name != LORA:
            yield from layers_of(below, f"{path}/{name}" if path else name)


def add_factors(
    params: Params, patterns: Sequence[str], sizes: Adaptation, key: PRNGKeyArray, name: str = "0"
) -> Params:
    """The tree with fresh factors, which change nothing yet; traceable.

    Args:
        params: by component.
        patterns: shell patterns of layers' paths, e.g. "unet/*/attn?/to_q".
        name: of the entry; those of one layer draw from keys of their own, or all would share one subspace.

    Raises:
        UserError: a pattern names no layer.
    """
    layers = dict(layers_of(params))
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise UserError(f"{pattern!r} names no dense or convolutional layer, such as {next(iter(layers))!r}")
    made = {}
    for path in sorted({path for pattern in patterns for path in fnmatch.filter(layers, pattern)}):
        own = stream_below(key, path) if name == "0" else stream_below(key, path, name)
        factors = fresh_factors(layers[path]["kernel"], sizes, own)
        made |= {f"{path}/{LORA}/{name}/{leaf}": array for leaf, array in factors.items()}
    return merge(params, unflatten(made))


def fresh_factors(kernel: Array, sizes: Adaptation, key: PRNGKeyArray) -> dict[str, Array]:
    """Factors of a kernel whose product is zero, in float32."""
    *taps, inputs, outputs = kernel.shape
    large = math.prod(taps) > 1
    rank = (sizes.conv_rank if large else None) or sizes.rank
    alpha = (sizes.conv_alpha if large and sizes.conv_rank else sizes.alpha) or rank
    shape = (*taps, inputs, rank)
    if sizes.init == GAUSSIAN:
        down = jax.random.normal(key, shape) / rank
    else:
        bound = 1.0 / math.sqrt(math.prod(taps) * inputs)
        down = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    made = {"down": down, "up": jnp.zeros((rank, outputs))}
    made["scale"] = jnp.asarray(alpha / (math.sqrt(rank) if sizes.rslora else rank), jnp.float32)
    if sizes.dora:
        made["magnitude"] = _lengths(kernel)
    if sizes.dropout:
        made[DROPOUT] = jnp.asarray(sizes.dropout, jnp.float32)
    return made


def with_dropout(params: Tree, key: PRNGKeyArray, path: str = "") -> Params:
    """The tree in which every entry with a dropout has a key of its own to draw with; traceable."""
    made = {n: with_dropout(v, key, f"{path}/{n}") if isinstance(v, Mapping) else v for n, v in params.items()}
    return {**made, "key": stream_below(key, path)} if DROPOUT in params else made


def strip_factors(params: Tree) -> Params:
    """The tree without factors."""
    return {n: strip_factors(v) if isinstance(v, Mapping) else v for n, v in params.items() if n != LORA}


def product(factors: Factors) -> Float[Array, "*hw i o"]:
    """The unscaled change of a kernel, in float32."""
    down, up = (factors[name].astype(jnp.float32) for name in ("down", "up"))
    if "mid" in factors:
        return jnp.einsum("in,hwnm,mo->hwio", down[0, 0], factors["mid"].astype(jnp.float32), up)
    return down @ up


def _lengths(kernel: Array) -> Float[Array, " o"]:
    """Norm of every output's weights."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axis=tuple(range(kernel.ndim - 1))))


def with_branches(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Flax interceptor: the output of a layer that has factors, with what they add."""
    module, out = context.module, call(*args, **kwargs)
    if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
        return out
    if not module.has_variable("params", LORA):
        return out
    own, x, base = cast(Any, module.variables["params"]), args[0], out
    for factors in own[LORA].values():
        added = _branch(module, x, factors) * _per_row(factors["scale"], out)
        if "magnitude" in factors:
            # As peft trains it, no gradient flows through the lengths (Liu et al. 2024, section 4.3).
            fixed = jax.lax.stop_gradient(own["kernel"] + factors["scale"] * product(factors))
            gain = (factors["magnitude"] / _lengths(fixed)).astype(out.dtype)
            weighed = base - own["bias"].astype(out.dtype) if module.use_bias else base
            added = (gain - 1.0) * weighed + gain * added
        out = out + added
    return out


def _branch(module: nn.Dense | nn.Conv, x: Array, factors: Factors) -> Array:
    """Output of the factors, unscaled; the first of a convolution is one of the same stride, padding and kind."""
    dtype = module.dtype or x.dtype
    down, up = factors["down"].astype(dtype), factors["up"].astype(dtype)
    x = x.astype(dtype)
    if isinstance(module, nn.Conv):
        if "mid" in factors:
            x, down = x @ down[0, 0], factors["mid"].astype(dtype)
        like = module.clone(parent=None, name=None, features=down.shape[-1], use_bias=False)
        hidden = cast(Array, like.apply({"params": {"kernel": down}}, x))
    else:
        hidden = x @ down
    if "key" in factors:
        keep = 1.0 - factors[DROPOUT]
        kept = jax.random.bernoulli(factors["key"], keep, hidden.shape)
        hidden = jnp.where(kept, hidden / keep.astype(dtype), 0)
    return hidden @ up


def _per_row(scale: Float[Array, "*b"], out: Array) -> Array:
    """A scale for every row: those of one image follow each other."""
    if scale.ndim:
        scale = jnp.repeat(scale, len(out) // len(scale)).reshape(-1, *[1] * (out.ndim - 1))
    return scale.astype(out.dtype)
