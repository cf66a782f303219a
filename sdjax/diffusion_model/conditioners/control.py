"""ControlNets: hints whose residuals act on the backbone at every step (Zhang et al. 2023).

Every way to weigh them, and when they begin and end, is one column that the host makes: a factor for each row of the
sampler's table, network, residual and kind of condition, so that no choice compiles anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params, numbered
from sdjax.data.hints.makers import CONTROL_FROM, CONTROL_IMAGE, CONTROL_RESIZE, make_hint
from sdjax.diffusion.denoise import per_image
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Network, Traits, required
from sdjax.diffusion_model.conditioners.hints import Hinted
from sdjax.models.conditioning import Cond, apply
from sdjax.models.controlnet import ControlNetConfig, controlnet_of

CONTROLNET, WEIGHTS = "controlnet", "control_weights"
SCALE, START, END, MODE = "control_scale", "control_start", "control_end", "control_mode"
DEFAULTS = {SCALE: 1.0, START: 0.0, END: 1.0}
BASE = 0.825  # of the original's guess mode (lllyasviel/ControlNet gradio_*.py)
DEEPEST, FINEST = 12, 64  # its last residual of Stable Diffusion; the latents' side at which the paper's weight is 1

Weigh = Callable[[ControlNetConfig, tuple[int, int]], np.ndarray]
"""(sizes, height and width of the latents) -> a factor for each residual."""


def _soft(config: ControlNetConfig, latents: tuple[int, int]) -> np.ndarray:
    # SDXL's ten residuals have the first ten of the thirteen (Mikubill/sd-webui-controlnet).
    return BASE ** (DEEPEST - np.arange(len(config.residuals), dtype=np.float64))


def _logarithmic(config: ControlNetConfig, latents: tuple[int, int]) -> np.ndarray:
    count = len(config.residuals)
    return np.ones(count) if config.global_pool else np.logspace(-1.0, 0.0, count)


def _by_resolution(config: ControlNetConfig, latents: tuple[int, int]) -> np.ndarray:
    return FINEST / (np.sqrt(latents[0] * latents[1]) / 2.0 ** np.array(config.residuals))


def _even(config: ControlNetConfig, latents: tuple[int, int]) -> np.ndarray:
    return np.ones(len(config.residuals))


MODES: dict[str, tuple[Weigh, bool]] = {
    "balanced": (_even, True),
    "prompt": (_soft, True),
    "control": (_soft, False),
    "guess": (_logarithmic, False),
    "resolution": (_by_resolution, False),
}
"""Factors of the residuals, and whether the null condition has them, too: A1111's "Balanced", "My prompt is more
important" and "ControlNet is more important", the last being the original's guess mode; diffusers' guess mode; and
the resolution weighting of guidance (Zhang et al. 2023, section 3.4), w = 64 / h."""


@dataclass(frozen=True)
class ControlConditioner(Conditioner):
    """`control_image` and with several networks `control_image_1`, ..., float32 [b H W k], and `control_weights`.

    Parameters of the networks are the components "controlnet", "controlnet_1", ...; features of their hints,
    `control_features`, ..., are computed once. The residuals of all are added up.

    Attributes:
        nets: their sizes.
        dtype: of their arithmetic.
        remat: as of the backbone.
    """

    nets: tuple[ControlNetConfig, ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @property
    def traits(self) -> Traits:
        return Traits(
            required=(CONTROL_IMAGE,),
            optional=(SCALE, START, END, MODE, CONTROL_FROM, CONTROL_RESIZE),
            step_columns=(WEIGHTS, *self._columns("control_features")),
            row_columns=(WEIGHTS,),
        )

    def _columns(self, stem: str) -> list[str]:
        """A name for each network."""
        return [numbered(stem, i) for i in range(len(self.nets))]

    @property
    def _hinted(self) -> Hinted:
        return Hinted(CONTROLNET, CONTROL_IMAGE, len(self.nets))

    @property
    def components(self) -> dict[str, Any]:
        return dict(zip(self._columns(CONTROLNET), self.nets, strict=True))

    def init(self, key: PRNGKeyArray) -> Params:
        pairs = zip(self.components.items(), jax.random.split(key, len(self.nets)), strict=True)
        return {name: controlnet_of(c).init(own, *c.example_inputs())["params"] for (name, c), own in pairs}

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        return self._hinted.image_size(inputs, factor)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        images = self._hinted.each(CONTROL_IMAGE, required(inputs, CONTROL_IMAGE, host.name))
        makers = inputs.get(CONTROL_FROM) or "none"
        makers = self._hinted.each(CONTROL_FROM, makers.split(",") if isinstance(makers, str) else makers)
        how = host.size, inputs.get(CONTROL_RESIZE), inputs.get("mask")
        hints = [make_hint(image, maker, *how) for image, maker in zip(images, makers, strict=True)]
        return {**dict(zip(self._columns(CONTROL_IMAGE), hints, strict=True)), WEIGHTS: self._weights(inputs, host)}

    def _weights(self, inputs: Mapping[str, Any], host: Host) -> Float[np.ndarray, "n nets residuals 2"]:
        """Factors of the residuals under the prompt and under the null condition."""
        chosen = [
            self._hinted.numbers(n, usual if inputs.get(n) is None else inputs[n]) for n, usual in DEFAULTS.items()
        ]
        # An average over the image is always a guess (diffusers, of the first of several networks).
        mode = "guess" if self.nets[0].global_pool else inputs.get(MODE) or "balanced"
        if mode not in MODES:
            raise unknown(MODE, mode, MODES)
        weigh, both = MODES[mode]
        weights = np.zeros((host.rows, len(self.nets), max(len(net.residuals) for net in self.nets), 2), np.float32)
        for i, (net, scale, *bounds) in enumerate(zip(self.nets, *chosen, strict=True)):
            on = acting(max(host.total, host.calls), *bounds)[: host.calls]
            each = np.float32(scale) * weigh(net, host.latents).astype(np.float32)
            weights[: host.calls, i, : len(each)] = (on[:, None] * each)[..., None] * np.array([1.0, both], np.float32)
        return weights

    def precompute(self, params: Params, columns: Columns) -> dict[str, Array]:
        hints = zip(self.components.items(), self._columns(CONTROL_IMAGE), strict=True)
        made = [
            apply(self._net(config), params[name], jnp.asarray(columns[hint]), method="features")
            for (name, config), hint in hints
        ]
        return dict(zip(self._columns("control_features"), made, strict=True))

    def _net(self, config: ControlNetConfig) -> Any:
        return controlnet_of(config, self.remat, self.dtype)

    def wrap(self, params: Params, columns: Columns, network: Network) -> Network:
        """The network with the residuals added up; without `control_weights`, as in training, each counts once."""

        def controlled(x: Array, t: Array, cond: Cond) -> Array:
            # What is joined to the latents, and images that are prompts, are the backbone's alone.
            seen = Cond(cond.context, cond.mask, cond.vector, label=cond.label)
            total: Sequence[Array] | None = None
            for i, (name, config) in enumerate(self.components.items()):
                features = columns[self._columns("control_features")[i]]
                rows = len(x) // len(features)
                each = jnp.repeat(jnp.asarray(features), rows, axis=0)
                made = apply(self._net(config), params[name], x, t, seen, each, method="residuals")
                if WEIGHTS in columns:
                    weights = _by_condition(jnp.asarray(columns[WEIGHTS])[:, i], rows)
                    made = [per_image(weights[:, k], r) * r for k, r in enumerate(made)]
                total = made if total is None else [a + b for a, b in zip(total, made, strict=True)]
            return network(x, t, cond._replace(control=None if total is None else tuple(total)))

        return controlled


def acting(calls: int, start: float, end: float) -> np.ndarray:
    """Tell of each network call whether it is controlled (diffusers' `controlnet_keep`), in float64 without tolerance.

    Raises:
        UserError: they are no shares of all calls, or the end does not come after the start.
    """
    if not 0.0 <= start < end <= 1.0:
        raise UserError(f"{START} {start:g} and {END} {end:g}: choose shares of 0 to 1, the start before the end")
    call = np.arange(calls)
    return ~((call / calls < start) | ((call + 1) / calls > end))


def _by_condition(weights: Float[Array, "b k 2"], rows: int) -> Float[Array, "r k"]:
    """Factors of all rows of a batch: those of its prompts, and then the null condition's where there is guidance."""
    kinds = np.array([0] * (rows - 1) + [1]) if rows > 1 else np.array([0])
    return jnp.moveaxis(weights[..., kinds], -1, 1).reshape(-1, weights.shape[1])
