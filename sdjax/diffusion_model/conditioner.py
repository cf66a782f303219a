"""The contract between a condition and everything that does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.tokenizers import Tokenizer
from sdjax.data.word_pieces import WordPieces
from sdjax.diffusion.denoise import Denoise, Network
from sdjax.models.conditioning import Cond

Columns = Mapping[str, Array | np.ndarray]
"""Conditions of a batch by name, one row an image, e.g. {"label": int32 [b]}."""


class Input(NamedTuple):
    """An input that a call may or must be given.

    Attributes:
        name: of the call's option, e.g. "class_label".
        required: whether there is nothing to sample without it.
    """

    name: str
    required: bool = True


class Host(NamedTuple):
    """Facts for `Conditioner.encode` that are no static argument of a program.

    Attributes:
        name: of the model, for messages.
        settings: of the checkpoint, e.g. {"classes": [...]}.
        tokenizers: by text encoder.
        size: height and width of the images in pixels.
        latents: height and width of their latents.
    """

    name: str
    settings: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer | WordPieces]
    size: tuple[int, int] = (0, 0)
    latents: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Conditioner:
    """Maps conditioning inputs to a `Cond`. Hashable, so it can be a static argument; the base is unconditional.

    Attributes of a subclass are sizes; parameters of its networks stand beside the backbone's.
    """

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Options of a call that this condition reads."""
        return ()

    @property
    def components(self) -> dict[str, Any]:
        """Configs of the condition's own networks, by component."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """Facts beside those configs that a stored model must keep, as JSON."""
        return {}

    @property
    def concat_channels(self) -> int:
        """Channels that are joined to the noisy latents."""
        return 0

    @property
    def context_width(self) -> int | None:
        """Features of the cross-attention tokens; None where there are none."""
        return None

    @property
    def keeps_size(self) -> bool:
        """Whether the inputs alone decide the image's size, so that width and height have no say."""
        return False

    @property
    def default_guidance(self) -> float:
        """Guidance scale where neither the call nor the checkpoint names one."""
        return 1.0

    @property
    def default_strength(self) -> float | None:
        """Strength of image to image where the call names none; None where an init_image is a condition alone."""
        return 0.75

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition, so that guidance has something to depart from."""
        return False

    @property
    def feather(self) -> float:
        """Pixels within a mask over which the given image fades out, where the call names none."""
        return 4.0

    @property
    def step_columns(self) -> tuple[str, ...]:
        """Columns that `wrap` and `steer` read at every step."""
        return ()

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters of `components`; traceable."""
        del key
        return {}

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        """Height and width in pixels that the inputs of one image ask for; None where they do not say.

        Args:
            inputs: of a call.
            factor: pixels of a latent along each side.
        """
        del inputs, factor
        return None

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        """Columns of one image, without the batch axis, from the options of a call.

        Raises:
            UserError: an input is missing, cannot be read, or does not fit the model.
        """
        del inputs, host
        return {}

    def images_to_encode(self, columns: Columns) -> dict[str, Float[Array, "b H W 3"]]:
        """Images in [-1, 1] whose scaled latents `cond` wants as further columns of the same names."""
        del columns
        return {}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        """The condition of a batch; traceable.

        Args:
            params: of `components`.
            columns: of the batch, with the latents of `images_to_encode`.
            keys: of the images, for conditions with noise.
        """
        del params, columns, keys
        return Cond()

    def null(self, columns: Columns) -> Columns | None:
        """Columns of the null condition, or None if the model was trained without condition dropout."""
        del columns
        return None

    def wrap(self, params: Params, columns: Columns, network: Network) -> Network:
        """The network with what acts on it at every step, e.g. the residuals of a ControlNet."""
        del params, columns
        return network

    def steer(self, params: Params, columns: Columns, denoise: Denoise, decode: Callable[..., Array]) -> Denoise:
        """The denoiser with a gradient added at every step, e.g. a classifier's.

        Args:
            params: of all networks.
            columns: those of `step_columns`.
            denoise: of the guided network.
            decode: scaled latents to images, 0 black and 1 white, not clipped.
        """
        del params, columns, decode
        return denoise

    def known(self, columns: Columns) -> tuple[Array | np.ndarray, Array | np.ndarray] | None:
        """Images in [0, 1] and masks [b H W 1] whose unmasked part belongs in the result; None where there are none."""
        del columns
        return None


@dataclass(frozen=True)
class Combined(Conditioner):
    """Several conditions of one model.

    Attributes:
        parts: the first decides what the others leave open, e.g. text before an inpainting model's masked image.
    """

    parts: tuple[Conditioner, ...] = ()

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(given for part in self.parts for given in part.inputs)

    @property
    def components(self) -> dict[str, Any]:
        return {name: config for part in self.parts for name, config in part.components.items()}

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.settings.items()}

    @property
    def concat_channels(self) -> int:
        return sum(part.concat_channels for part in self.parts)

    @property
    def context_width(self) -> int | None:
        return next((part.context_width for part in self.parts if part.context_width is not None), None)

    @property
    def keeps_size(self) -> bool:
        return any(part.keeps_size for part in self.parts)

    @property
    def default_guidance(self) -> float:
        return self.parts[0].default_guidance

    @property
    def default_strength(self) -> float | None:
        usual = Conditioner().default_strength
        return next((part.default_strength for part in self.parts if part.default_strength != usual), usual)

    @property
    def step_columns(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.step_columns)

    def init(self, key: PRNGKeyArray) -> Params:
        return {name: value for part in self.parts for name, value in part.init(key).items()}

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        return next((size for part in self.parts if (size := part.image_size(inputs, factor)) is not None), None)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.encode(inputs, host).items()}

    def images_to_encode(self, columns: Columns) -> dict[str, Array]:
        return {name: image for part in self.parts for name, image in part.images_to_encode(columns).items()}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        joined = Cond()
        for part in self.parts:
            own = part.cond(params, columns, keys)
            joined = joined._replace(**{name: value for name, value in own._asdict().items() if value is not None})
        return joined

    def null(self, columns: Columns) -> Columns | None:
        nulls = [null for part in self.parts if (null := part.null(columns)) is not None]
        if not nulls:
            return None
        # Each changes its own columns alone.
        return {name: next((n[name] for n in nulls if n[name] is not columns[name]), columns[name]) for name in columns}

    def wrap(self, params: Params, columns: Columns, network: Network) -> Network:
        for part in self.parts:
            network = part.wrap(params, columns, network)
        return network

    def steer(self, params: Params, columns: Columns, denoise: Denoise, decode: Callable[..., Array]) -> Denoise:
        for part in self.parts:
            denoise = part.steer(params, columns, denoise, decode)
        return denoise

    @property
    def feather(self) -> float:
        return next(
            (part.feather for part in self.parts if part.feather != Conditioner().feather), Conditioner().feather
        )

    @property
    def has_null(self) -> bool:
        return any(part.has_null for part in self.parts)

    def known(self, columns: Columns) -> tuple[Array | np.ndarray, Array | np.ndarray] | None:
        return next((found for part in self.parts if (found := part.known(columns)) is not None), None)


def in_unit_range(images: Array | np.ndarray) -> Array:
    """Images in [0, 1], from bytes or from floats that are so already."""
    x = jnp.asarray(images)
    return x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x.astype(jnp.float32)


def required(inputs: Mapping[str, Any], name: str, model: str) -> Any:
    """The value of an input.

    Raises:
        UserError: it is missing.
    """
    value = inputs.get(name)
    if value is None:
        raise UserError(f"{model} needs {name}")
    return value
