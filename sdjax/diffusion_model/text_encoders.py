"""Text encoders behind one protocol: tokens to cross-attention context and a pooled vector."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdjax.core.tree import Params
from sdjax.data.text.t5_tokenizer import PAD
from sdjax.models.clip import TEXT_LAYERS, CLIPText, CLIPTextConfig, TextLayer, emphasise, layer_states
from sdjax.models.conditioning import apply
from sdjax.models.t5 import T5Config, T5Encoder


class TextEmbeddings(NamedTuple):
    """Output of text encoders.

    Attributes:
        context: the states of all chunks one after another.
        pooled: summary of the first chunk.
    """

    context: Float[Array, "b m d"]
    pooled: Float[Array, "b p"]


class TextEncoder(Protocol):
    """A frozen network over token ids; hashable.

    Attributes:
        name: component of its parameters, e.g. "text_encoder".
        config: sizes of the network.
        width, pooled_width: features of the context and of the pooled vector.
        max_length: tokens of a chunk.
        max_skip: the most layers that `clip_skip` may skip.
    """

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any: ...
    @property
    def width(self) -> int: ...
    @property
    def pooled_width(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def max_skip(self) -> int: ...

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters; traceable."""
        ...

    def encode(
        self,
        params: Params,
        ids: Int[Array, "b n l"],
        weights: Float[Array, "b n l"] | None = None,
        clip_skip: Int[Array, " b"] | None = None,
    ) -> TextEmbeddings:
        """Embeddings of n chunks of each prompt.

        Args:
            params, ids: of all components, and token ids.
            weights: emphasis of each token; None where all weigh 1.
            clip_skip: layers to skip beyond the model's own, one an image; None skips none.
        """
        ...


class CLIPEncoder(NamedTuple):
    """CLIP's text tower as a `TextEncoder`.

    Attributes:
        name: "text_encoder" or "text_encoder_2".
        module: the network.
        layer: hidden layer used as cross-attention context.
    """

    name: str
    module: CLIPText
    layer: TextLayer = TEXT_LAYERS["last"]

    @property
    def config(self) -> CLIPTextConfig:
        return self.module.config

    @property
    def width(self) -> int:
        return self.module.config.width

    @property
    def pooled_width(self) -> int:
        return self.module.config.projection_dim or self.module.config.width

    @property
    def max_length(self) -> int:
        return self.module.config.max_length

    @property
    def max_skip(self) -> int:
        return self.module.config.layers + 1 - self.layer.back

    def init(self, key: PRNGKeyArray) -> Params:
        return dict(self.module.init(key, jnp.zeros((1, self.max_length), jnp.int32))["params"])

    def encode(
        self,
        params: Params,
        ids: Int[Array, "b n l"],
        weights: Float[Array, "b n l"] | None = None,
        clip_skip: Int[Array, " b"] | None = None,
    ) -> TextEmbeddings:
        b, n, length = ids.shape
        own = params[self.name]
        output = apply(self.module, own, ids.reshape(b * n, length))

        def normalise(hidden: Array) -> Array:
            return apply(self.module, own, hidden, method="normalise")

        if clip_skip is None:
            states = layer_states(output, self.layer, normalise)
        else:
            # A traced choice among all layers, so that another clip_skip compiles nothing.
            last = len(output.hidden) - self.layer.back
            chosen = jnp.repeat(last - clip_skip, n)
            states = jax.vmap(lambda hidden, i: hidden[i], in_axes=(1, 0))(jnp.stack(output.hidden), chosen)
            states = normalise(states) if self.layer.normalised else states
        states = states.reshape(b, n, length, -1)
        if weights is not None:
            states = emphasise(states, weights)
        return TextEmbeddings(states.reshape(b, n * length, -1), output.pooled.reshape(b, n, -1)[:, 0])


class T5TextEncoder(NamedTuple):
    """T5's encoder, of prompts of one chunk; it has no pooled state.

    Attributes:
        name: component of its parameters, "text_encoder".
        module: the network.
    """

    name: str
    module: T5Encoder

    @property
    def config(self) -> T5Config:
        return self.module.config

    @property
    def width(self) -> int:
        return self.module.config.width

    def init(self, key: PRNGKeyArray) -> Params:
        return dict(self.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"])

    def encode(self, params: Params, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """States of all tokens; pads, which no token attends to, have states, too, as DeepFloyd IF gives them."""
        return apply(self.module, params[self.name], ids, ids != PAD)
