"""The contract between a condition and everything that does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.text.t5_tokenizer import T5Tokenizer
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.data.text.word_pieces import WordPieces
from sdjax.diffusion.denoise import Denoise
from sdjax.models.conditioning import Cond

Columns = Mapping[str, Array | np.ndarray]
"""Conditions of a batch by name, one row an image, e.g. {"label": int32 [b]}."""

Network = Callable[[Float[Array, "b h w c"], Float[Array, " b"], Cond], Float[Array, "b h w d"]]
"""(latents of unit variance, timesteps, condition) -> the prediction. With guidance an image has several rows, one
after another: those of its prompts, then that of the null condition."""

STATES = "_states"


class Traits(NamedTuple):
    """Facts about a condition, declared as data.

    Attributes:
        required: options of a call, e.g. "class_label", without which there is nothing to sample.
        optional: further options that this condition reads.
        concat_channels: channels that are joined to the noisy latents.
        context_width: features of the cross-attention tokens; None where there are none.
        keeps_size: whether the inputs alone decide the image's size, so that width and height have no say.
        has_null: whether the model was trained with condition dropout, so that guidance has something to depart from.
        guidance_scale: where neither the call nor the checkpoint names one.
        steps: of the sampler, where neither names them; None for the usual number.
        strength: of image to image, where the call names none; None where an init_image is a condition alone.
        feather: pixels within a mask over which the given image fades out, where the call names none.
        step_columns: columns that `wrap` and `steer` read at every step.
        row_columns: those of them that have a value for each row of the sampler's table: [b n ...], of which `wrap` and
            `steer` get the row's own.
        prompt_columns: columns that prompts decide, of which an image with several prompts has several.
        shared_columns: columns that all images of a batch have alike, since they change weights.
        keeps_clean: whether what a mask keeps of an image has no noise at any step (DeepFloyd IF's inpainting).
        text_columns: columns of token ids, each of which `encode_text` encodes by itself: into the column of this name
            with `STATES` after it.
        draws_latents: whether latents of `images_to_encode` are drawn from their posterior; else they are its mean.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    concat_channels: int = 0
    context_width: int | None = None
    keeps_size: bool = False
    has_null: bool = False
    guidance_scale: float = 1.0
    steps: int | None = None
    strength: float | None = 0.75
    feather: float = 4.0
    step_columns: tuple[str, ...] = ()
    row_columns: tuple[str, ...] = ()
    prompt_columns: tuple[str, ...] = ()
    shared_columns: tuple[str, ...] = ()
    keeps_clean: bool = False
    text_columns: tuple[str, ...] = ()
    draws_latents: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """All options that this condition reads."""
        return self.required + self.optional

    def joined(self, other: Traits) -> Traits:
        """Merge the traits of two conditions: tuples are concatenated and channels added; for the rest a non-default
        value overrides the default, `self` taking precedence."""
        usual = Traits()._asdict()
        added = ("required", "optional", "concat_channels", "step_columns", "row_columns", "prompt_columns")
        added += ("shared_columns", "text_columns")
        pairs = [(name, mine, getattr(other, name)) for name, mine in self._asdict().items()]
        return Traits(**{n: a + b if n in added else b if a == usual[n] else a for n, a, b in pairs})


class Host(NamedTuple):
    """Host-side context of `Conditioner.encode`; never a static argument of a jitted function.

    Attributes:
        name: of the model, for messages.
        settings: of the checkpoint, e.g. {"classes": [...]}.
        tokenizers: by text encoder.
        size: height and width of the images in pixels.
        latents: height and width of their latents.
        rows: of the sampler's table, the length of what `Traits.row_columns` names.
        calls: of the network; the first so many rows make one each (diffusers' timesteps as iterated).
        total: of those and a refiner's that follow; 0 for `calls`.
    """

    name: str
    settings: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer | WordPieces | T5Tokenizer]
    size: tuple[int, int] = (0, 0)
    latents: tuple[int, int] = (0, 0)
    rows: int = 0
    calls: int = 0
    total: int = 0


@dataclass(frozen=True)
class Conditioner:
    """Maps conditioning inputs to a `Cond`. Hashable, so it can be a static argument; the base is unconditional.

    Attributes of a subclass are sizes; parameters of its networks stand beside the backbone's.
    """

    @property
    def traits(self) -> Traits:
        """Facts about the condition."""
        return Traits()

    @property
    def components(self) -> dict[str, Any]:
        """Configs of the condition's own networks, by component."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """Facts beside those configs that a stored model must keep, as JSON."""
        return {}

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters of `components`; traceable."""
        return {}

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        """Height and width that one image's inputs ask for, `factor` pixels a latent; None where they do not say."""
        return None

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        """Columns of one image, arrays without the batch axis, from the options of a call.

        Raises:
            UserError: an input is missing, cannot be read, or does not fit the model.
        """
        return {}

    def with_image(self, columns: Mapping[str, np.ndarray], image: Any, host: Host) -> Mapping[str, np.ndarray]:
        """Columns of one image, for another init_image [H W 3] in [0, 1]: what the stage before made.

        Raises:
            UserError: it does not fit the model.
        """
        return columns

    def images_to_encode(self, columns: Columns) -> dict[str, Float[Array, "b H W 3"]]:
        """Images in [-1, 1] whose scaled latents `cond` wants as further columns of the same names."""
        return {}

    def change_weights(self, params: Params, columns: Columns) -> dict[str, Array]:
        """Parameters by path, e.g. "unet/conv_in/kernel", that take the place of the model's own; traceable.

        Args:
            params, columns: of all networks, and those of `Traits.shared_columns`, of any image of the batch.
        """
        return {}

    def adapt(self, params: Params, columns: Columns) -> Params:
        """The parameters as the networks see them, e.g. with factors at the strengths of each image; traceable.

        Args:
            params, columns: of all networks; and of a batch with the rows of what the networks see, or with one an
                image where they see several of each, and those of `Traits.step_columns` alone.
        """
        return params

    def encode_text(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """States of a column of `Traits.text_columns`, the same whatever else is in a batch; traceable.

        `cond` makes them where they are not among the columns.
        """
        raise NotImplementedError(f"{type(self).__name__} has no text columns")

    def precompute(self, params: Params, columns: Columns) -> dict[str, Array]:
        """Further columns, which no step changes and the loop need not repeat, e.g. features of a hint; traceable.

        Args:
            params, columns: of all networks, and of the batch with the latents of `images_to_encode`.
        """
        return {}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        """The condition of a batch; traceable.

        Args:
            params, columns: of `components`, and of the batch with those of `images_to_encode` and `precompute`.
            keys: of the images, for conditions with noise.
        """
        return Cond()

    def null(self, columns: Columns) -> Columns | None:
        """Columns of the null condition, or None if the model was trained without condition dropout."""
        return None

    def wrap(self, params: Params, columns: Columns, network: Network) -> Network:
        """The network with what acts on it at every step, e.g. the residuals of a ControlNet.

        Args:
            params, columns: of all networks, and those of `Traits.step_columns`; while training, of the batch.
        """
        return network

    def steer(self, params: Params, columns: Columns, denoise: Denoise, decode: Callable[..., Array]) -> Denoise:
        """The denoiser with a gradient added at every step, e.g. a classifier's.

        Args:
            params, columns: of all networks, and those of `Traits.step_columns`.
            denoise: of the guided network.
            decode: scaled latents to images, 0 black and 1 white, not clipped.
        """
        return denoise

    def known(self, columns: Columns) -> tuple[Array | np.ndarray, Array | np.ndarray] | None:
        """Images in [0, 1] and masks [b H W 1] whose unmasked part belongs in the result; None where there are none."""
        return None


@dataclass(frozen=True)
class Combined(Conditioner):
    """Several conditions of one model, e.g. text and an inpainting model's masked image.

    Attributes:
        parts: the conditioners to combine; no two write the same column or the same field of `Cond`.
    """

    parts: tuple[Conditioner, ...] = ()

    @property
    def traits(self) -> Traits:
        joined = Traits()
        for part in self.parts:
            joined = joined.joined(part.traits)
        return joined

    @property
    def components(self) -> dict[str, Any]:
        return _union(part.components for part in self.parts)

    @property
    def settings(self) -> dict[str, Any]:
        return _union(part.settings for part in self.parts)

    def init(self, key: PRNGKeyArray) -> Params:
        keys = jax.random.split(key, len(self.parts))
        return _union(part.init(own) for part, own in zip(self.parts, keys, strict=True))

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        return next((size for part in self.parts if (size := part.image_size(inputs, factor)) is not None), None)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        return _union(part.encode(inputs, host) for part in self.parts)

    def with_image(self, columns: Mapping[str, np.ndarray], image: Any, host: Host) -> Mapping[str, np.ndarray]:
        for part in self.parts:
            columns = part.with_image(columns, image, host)
        return columns

    def images_to_encode(self, columns: Columns) -> dict[str, Array]:
        return _union(part.images_to_encode(columns) for part in self.parts)

    def change_weights(self, params: Params, columns: Columns) -> dict[str, Array]:
        return _union(part.change_weights(params, columns) for part in self.parts)

    def adapt(self, params: Params, columns: Columns) -> Params:
        for part in self.parts:
            params = part.adapt(params, columns)
        return params

    def encode_text(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        reader = next(part for part in self.parts if part.traits.text_columns)
        return reader.encode_text(params, tokens)

    def precompute(self, params: Params, columns: Columns) -> dict[str, Array]:
        return _union(part.precompute(params, columns) for part in self.parts)

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
        return {name: next((n[name] for n in nulls if n[name] is not columns[name]), columns[name]) for name in columns}

    def wrap(self, params: Params, columns: Columns, network: Network) -> Network:
        for part in self.parts:
            network = part.wrap(params, columns, network)
        return network

    def steer(self, params: Params, columns: Columns, denoise: Denoise, decode: Callable[..., Array]) -> Denoise:
        for part in self.parts:
            denoise = part.steer(params, columns, denoise, decode)
        return denoise

    def known(self, columns: Columns) -> tuple[Array | np.ndarray, Array | np.ndarray] | None:
        return next((found for part in self.parts if (found := part.known(columns)) is not None), None)


def _union(parts: Any) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def in_unit_range(images: Array | np.ndarray) -> Array:
    """Images in [0, 1], from bytes or from floats that are so already."""
    x = jnp.asarray(images)
    return x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x.astype(jnp.float32)


def required(inputs: Mapping[str, Any], name: str, model: str) -> Any:
    """The value of an input; a UserError where it is missing."""
    value = inputs.get(name)
    if value is None:
        raise UserError(f"{model} needs {name}")
    return value
