"""CLIP's contrastive training of a text and an image tower (Radford et al. 2021, section 2.3 and figure 3).

Reads config.model (text_encoder and image_encoder, each a variant and what differs from it, and the folder of a
tokenizer), config.data, config.sample (count, columns), and of config.task: initial, a folder of a CLIP to begin from
or "" for random parameters, and export_dtype. The data need captions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sdjax.checkpoints.checkpoint import find_tokenizer
from sdjax.checkpoints.clip_pair import FIRST_LOGIT_SCALE, CLIPPair, read_clip, write_clip
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Params
from sdjax.data.image_inputs import CLIP_MEAN, CLIP_STD
from sdjax.data.images import tile
from sdjax.data.loader import Loader
from sdjax.data.text.tokenizers import Tokenizer, load_tokenizer
from sdjax.data.transforms import crops
from sdjax.data.transforms.conditions import DRAW_CAPTION, TokenizeWords
from sdjax.data.transforms.images import Select
from sdjax.models import clip, clip_image
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.clip_image import CLIPImage, CLIPImageConfig
from sdjax.models.conditioning import apply
from sdjax.ops.partition import BATCH, constrain
from sdjax.tasks.base import batches, data_identity, gathered, open_images, square_crops
from sdjax.tasks.variants import sizes_of
from sdjax.training.task import DevicePut, Metrics, Task

TEXT, IMAGE, LOGIT_SCALE, TOKENS = "text", "image", "logit_scale", "tokens"
LARGEST_LOGIT_SCALE = float(np.log(100.0))


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "contrastive".

    Raises:
        UserError: a name in the config is not what it should be, or sizes do not fit each other.
    """
    text, image = sizes_of_towers(config)
    tokenizer = tokenizer_of(config, text)
    dtype = dtype_named(config.train.dtype, "config.train.dtype")
    towers = CLIPText(text, dtype), CLIPImage(image, dtype)

    def init(key: PRNGKeyArray) -> Params:
        text_key, image_key = jax.random.split(key)
        pixels = jnp.zeros((1, image.size, image.size, 3))
        return {
            TEXT: dict(towers[0].init(text_key, jnp.zeros((1, text.max_length), jnp.int32))["params"]),
            IMAGE: dict(towers[1].init(image_key, pixels)["params"]),
            LOGIT_SCALE: jnp.float32(FIRST_LOGIT_SCALE),
        }

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del key, step
        scale = jnp.exp(bounded(params[LOGIT_SCALE]))
        value, accuracy = contrastive_loss(*embed(towers, params, batch), scale)
        return value, {"accuracy": accuracy, "logit_scale": scale}

    def batch(params: Params) -> Loader:
        del params
        images, cuts = square_crops(config)
        rows = [*cuts, DRAW_CAPTION, TokenizeWords(tokenizer), Select((IMAGE, TOKENS))]
        return batches(config, images, rows, mesh)

    def preview(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        """Images, evenly chosen; one that fits the caption of another of them better is dark."""
        found = crops.still(open_images(config), image.size, config.data.crop).map(TokenizeWords(tokenizer))
        rows: Any = [found[i * len(found) // config.sample.count] for i in range(config.sample.count)]
        stacked = {name: np.stack([row[name] for row in rows]) for name in (IMAGE, TOKENS)}
        cosines = np.asarray(_cosines(towers, params, stacked))
        right = cosines.argmax(1) == np.arange(len(rows))
        shown = np.where(right[:, None, None, None], stacked[IMAGE], stacked[IMAGE] // 4)
        return tile(shown, config.sample.columns)

    def export(params: Params, folder: Path) -> None:
        scale = min(float(params[LOGIT_SCALE]), LARGEST_LOGIT_SCALE)
        pair = CLIPPair(text, params[TEXT], image, params[IMAGE], Path(config.model.tokenizer), scale)
        write_clip(folder, pair, config.task.export_dtype)

    def batch_spec(rows: int) -> dict[str, Any]:
        pixels = jax.ShapeDtypeStruct((rows, image.size, image.size, 3), jnp.uint8)
        return {IMAGE: pixels, TOKENS: jax.ShapeDtypeStruct((rows, text.max_length), jnp.int32)}

    def pretrained(put: DevicePut) -> Params:
        return put_pair(config.task.initial, (text, image), put) if config.task.initial else {}

    use = "python -m sdjax.eval --fake SAMPLES --clip {workdir}/export"
    identity = lambda: data_identity(config)  # noqa: E731
    return Task(init, loss, preview, batch, export, batch_spec, pretrained=pretrained, use=use, identity=identity)


def sizes_of_towers(config: Config) -> tuple[CLIPTextConfig, CLIPImageConfig]:
    """`config.model.text_encoder` and `.image_encoder`: variants, and fields in place of their own.

    Raises:
        UserError: no such variant or field, or the sizes do not fit each other, the images or the batch.
    """
    model = config.model
    text = sizes_of(model.text_encoder, clip.VARIANTS, "config.model.text_encoder")
    image = sizes_of(model.image_encoder, clip_image.VARIANTS, "config.model.image_encoder")
    if text.projection_dim != image.projection_dim:
        raise UserError(
            f"config.model.text_encoder.projection_dim={text.projection_dim} must be that of image_encoder, "
            f"{image.projection_dim}"
        )
    if config.data.size != image.size:
        raise UserError(f"config.data.size={config.data.size}; the image encoder is made for images of {image.size}")
    if config.train.accumulate != 1:
        raise UserError(
            f"config.train.accumulate={config.train.accumulate}: each caption is held against all images of the "
            "batch, which cannot be worked through in parts; it must be 1"
        )
    return text, image


def tokenizer_of(config: Config, text: CLIPTextConfig) -> Tokenizer:
    """The tokenizer in `config.model.tokenizer`.

    Raises:
        UserError: there is none, or it has other tokens than the text tower.
    """
    tokenizer = load_tokenizer(find_tokenizer(Path(config.model.tokenizer)), text.max_length)
    if tokenizer.vocab_size > text.vocab_size or tokenizer.eos != text.eos_token_id:
        raise UserError(
            f"config.model.text_encoder has vocab_size={text.vocab_size}, eos_token_id={text.eos_token_id}; the "
            f"tokenizer {config.model.tokenizer} has {tokenizer.vocab_size} tokens, of which {tokenizer.eos} is the end"
        )
    return tokenizer


def put_pair(folder: str, sizes: tuple[CLIPTextConfig, CLIPImageConfig], put: DevicePut) -> Params:
    """The parameters of a CLIP in a folder, on their devices.

    Raises:
        UserError: it cannot be read, or has other sizes.
    """
    pair = read_clip(Path(folder).expanduser())
    if (pair.text, pair.image) != sizes:
        raise UserError(f"config.task.initial={folder!r} is a CLIP of other sizes than config.model")
    params = {TEXT: pair.text_params, IMAGE: pair.image_params, LOGIT_SCALE: np.float32(pair.logit_scale)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: put(np.asarray(leaf), "/".join(part.key for part in path)), params
    )


def embed(
    towers: tuple[CLIPText, CLIPImage], params: Params, batch: Any
) -> tuple[Float[Array, "b p"], Float[Array, "b p"]]:
    """Embeddings of captions and of images, of length 1, float32."""
    pixels = (batch[IMAGE].astype(jnp.float32) / 255.0 - CLIP_MEAN) / CLIP_STD
    pooled = (
        apply(towers[0], params[TEXT], batch[TOKENS]).pooled,
        apply(towers[1], params[IMAGE], constrain(pixels, BATCH, None, None, None)).pooled,
    )
    text, image = (
        x.astype(jnp.float32) / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True) for x in pooled
    )
    return text, image


def contrastive_loss(
    text: Float[Array, "b p"], image: Float[Array, "b p"], scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric cross-entropy of each caption among all images, and of each image among all captions.

    The batch is that of all devices: each keeps its own rows of the logits, against all of the others' embeddings.

    Returns:
        The loss, and the share of images whose own caption fits best.
    """
    own = jnp.arange(len(text))
    by_text = constrain(scale * text @ gathered(image).T, BATCH, None)
    by_image = constrain(scale * image @ gathered(text).T, BATCH, None)
    losses = [optax.softmax_cross_entropy_with_integer_labels(logits, own).mean() for logits in (by_text, by_image)]
    return (losses[0] + losses[1]) / 2.0, (by_image.argmax(-1) == own).mean()


@jax.custom_vjp
def bounded(logit_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of the scale, at most that of 100 (section 2.5).

    Beyond it only gradients that lower it pass: with those of a minimum, which are zero, it would never come back.
    """
    return jnp.minimum(logit_scale, LARGEST_LOGIT_SCALE)


def _bounded(logit_scale: Array) -> tuple[Array, Array]:
    return bounded(logit_scale), logit_scale


def _inward(logit_scale: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where((logit_scale >= LARGEST_LOGIT_SCALE) & (gradient < 0.0), 0.0, gradient),)


bounded.defvjp(_bounded, _inward)


@jax.jit(static_argnums=0)
def _cosines(towers: tuple[CLIPText, CLIPImage], params: Params, batch: Any) -> Float[Array, "b b"]:
    """Cosines of images, in rows, and captions."""
    text, image = embed(towers, params, batch)
    return gathered(image @ text.T)
