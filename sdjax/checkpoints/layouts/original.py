"""Checkpoints in one file of the original naming, read; `writing` writes Stable Diffusion's.

Such a file says neither its family nor its sizes: they are found in its keys, shapes and metadata. It holds no
tokenizer either; CLIP's published one is what Stable Diffusion's models were trained with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints.checkpoint import (
    ALL_FORMATS,
    TOKENIZERS,
    Checkpoint,
    Component,
    Dtypes,
    ReadOptions,
    pixel_conditioning,
    read_params,
)
from sdjax.checkpoints.families import (
    COND,
    FAMILIES,
    FIRST,
    ONE_STEP,
    SCALES,
    SKIPPED,
    UNET,
    VAE,
    Family,
    find_family,
    find_prediction,
    scheduler_config,
    with_ldm_names,
)
from sdjax.checkpoints.kinds import LDM, PIXELS, STABLE_DIFFUSION
from sdjax.checkpoints.ldm_config import LDMConfig, config_beside
from sdjax.checkpoints.mapping import Kind, Put, Shapes, Writable, check_blocks, check_shapes, listed, stored_shapes
from sdjax.checkpoints.networks import autoencoder, clip, embedders, unet, unet2d
from sdjax.checkpoints.original_keys import SQUEEZED, Piece, SplitTensor, inward, outward, without_prefix
from sdjax.checkpoints.storage.weights import Source, Weights, read_file
from sdjax.core.assets import ASSETS
from sdjax.core.errors import UserError, unknown
from sdjax.models.adm_classifier import VARIANTS

logger = logging.getLogger("sdjax")

TOKENIZER_FOLDERS = ASSETS / "clip"
AVERAGES, WEIGHTS = "model_ema.", ("ema", "model")
FACTOR = 8  # of the autoencoders of Stable Diffusion, where a file lacks its own
UNSQUEEZED = Piece("", Kind(SQUEEZED.outward, SQUEEZED.inward))
OTHER_NAMES = (
    # The first files were written before transformers had the inner name.
    (
        r"^((cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(embeddings|encoder|final_layer_norm)\.",
        r"\1text_model.\3.",
    ),
    # LDM's UNets are not conditioned on the guidance scale; diffusers' script of conversion leaves its own name.
    (r"^(model\.diffusion_model\.)time_embedding\.cond_proj\.", r"\1time_embed.cond_proj."),
)


class Detected(NamedTuple):
    """The family that a single file was taken for, what it predicts ("epsilon", "v_prediction" or "sample") and why
    that is believed, and the channels of its UNet: 4, or 9 for inpainting, 5 for depth, 7 for the upscaler."""

    family: str
    prediction: str
    reason: str
    in_channels: int

    def __str__(self) -> str:
        kind = {9: ", inpainting", 5: ", depth"}.get(self.in_channels, "")
        return f"{FAMILIES[self.family].title or self.family}{kind}; predicts {self.prediction} ({self.reason})"


class Network(NamedTuple):
    """A network in a file: its component's name, its keys' prefix, its config and where its tensors are."""

    name: str
    prefix: str
    config: Any
    extra: Mapping[str, Any]
    pieces: Mapping[str, Piece]

    @property
    def is_open_clip(self) -> bool:
        """Tell whether it is a text encoder under OpenCLIP's names."""
        return self.name in TOKENIZERS and self.prefix.endswith(".model.")

    def original_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its whole original key."""
        form = ALL_FORMATS[self.name]
        shapes = stored_shapes(form.table(self.config), form.shapes(self.config))
        arrays = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
        return {self.prefix + key: whole.shape for key, whole in outward(self.pieces, arrays).items()}


def detect(source: Source, *, family: str | None = None, prediction: str | None = None) -> Detected:
    """The model that `read_single_file` takes a file for; of a safetensors file hardly more than the header is read.

    Raises:
        UserError: as `read_single_file`.
    """
    stored = _read(source)
    return _detect(stored, config_beside(stored.path), family, prediction, ())


def _read(source: Source) -> Weights:
    stored = read_file(source)
    return stored._replace(tensors=with_ldm_names(stored.tensors))


def _detect(
    stored: Weights, config: LDMConfig, family: str | None, prediction: str | None, optional: Collection[str]
) -> Detected:
    tensors, facts, path = stored
    name = find_family(shapes_of(tensors), family, path, optional)
    prefix = "" if FAMILIES[name].kind == PIXELS else UNET
    in_channels = shapes_of(tensors)[prefix + FIRST][1]
    claims = (
        (prediction, "as requested"),
        (config.prediction, f"{config.name} says so"),
        ("sample" if ONE_STEP.search(path.stem) else None, "its name says x0"),
    )
    return Detected(name, *find_prediction(name, tensors, facts, in_channels, claims), in_channels)


def read_single_file(
    source: Source,
    dtype: Dtypes = "float32",
    *,
    family: str | None = None,
    prediction: str | None = None,
    weights: str | None = None,
    place: Put | None = None,
    optional: Collection[str] = (),
) -> Checkpoint:
    """Reads a `.safetensors` file, or one of PyTorch's; `detect` says what it is taken for.

    Args:
        dtype, place: as in `sdjax.checkpoints.checkpoint.Reading`.
        family: one of `FAMILIES`; None to find out.
        prediction: "epsilon", "v_prediction" or "sample"; None to find out, also in a `.yaml` beside the file.
        weights: "model", or "ema" for the UNet's average over training, which some files hold besides; None takes
            averages of the LDM paper's models where the file has them, as the paper samples.
        optional: components that it may lack, e.g. ("vae",).

    Raises:
        UserError: the file is missing or corrupt, is of no family here (the message says what it looks like), or lacks
            keys of its family or has scales of quantised weights.
    """
    stored = _read(source)
    path, config = stored.path, config_beside(stored.path)
    found = _detect(stored, config, family, prediction, optional)
    row, how = FAMILIES[found.family], ReadOptions(dtype, place)
    kept = chosen_weights(stored.tensors, weights or (None if row.kind == LDM else "model"), path)
    averaged = any(kept[key] is not stored.tensors[key] for key in kept)
    logger.info("%s is taken for %s%s", path.name, found, "; averaged weights" if averaged else "")
    tensors = wanted(kept)
    scale = (_own_scale(stored.tensors, path) if row.kind == LDM else None) or config.scale
    networks = networks_in(shapes_of(tensors), found, path, scale)
    tensors = as_expected(tensors, networks)
    check_fit(tensors, networks, path)
    components = {network.name: component_of(network, tensors, path, how) for network in networks}
    settings = dict(row.settings)
    if "class_embedder" in components and "guidance_scale" in settings:  # it guides from the last class
        settings["none"] = components["class_embedder"].config.classes - 1
    folders = {n.name: "open_clip" if n.is_open_clip else "clip_l" for n in networks if n.name in TOKENIZERS}
    return Checkpoint(
        components=components,
        scheduler=scheduler_config(found.family, found.prediction, stored.tensors, config.scheduler),
        conditioning=row.conditioning or pixel_conditioning(components["unet"].config, path),
        settings=settings,
        tokenizers={name: TOKENIZER_FOLDERS / folder for name, folder in folders.items()},
        low_res_scheduler=row.low_res_scheduler,
    )


def chosen_weights(tensors: Mapping[str, Writable], weights: str | None, path: object) -> dict[str, Writable]:
    """The tensors of a file, its UNet's averaged or not, and no averages beside them.

    Each average is named as the parameter, without its dots (CompVis/latent-diffusion, ldm/modules/ema.py).

    Args:
        weights: "ema", "model", or None for averages where the file has them.

    Raises:
        UserError: there is no such choice, or the file lacks the averages.
    """
    if weights not in (None, *WEIGHTS):
        raise unknown("weights", weights, WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(AVERAGES)}
    if weights == "model":
        return kept
    names = {key: AVERAGES + key.removeprefix("model.").replace(".", "") for key in kept if key.startswith(UNET)}
    here = {key: name for key, name in names.items() if name in tensors}
    if not here and weights is None:
        return kept
    if not here or len(here) < len(names):
        raise UserError(f"{path} has averages of {len(here)} of the UNet's {len(names)} tensors")
    return kept | {key: tensors[name] for key, name in here.items()}


def wanted(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """The tensors of networks, under today's spelling of their keys.

    Inpainting models of the LDM paper's name their first stage twice: it is their condition's network, too.
    """
    skipped = re.compile("|".join(f"({pattern})" for pattern in SKIPPED))
    kept = {key: tensor for key, tensor in tensors.items() if not skipped.fullmatch(key)}
    for pattern, replacement in OTHER_NAMES:
        kept = {re.sub(pattern, replacement, key): tensor for key, tensor in kept.items()}
    twins = {COND + key.removeprefix(VAE) for key in kept if key.startswith(VAE)}
    return {key: tensor for key, tensor in kept.items() if key not in twins}


def shapes_of(tensors: Mapping[str, Writable]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _own_scale(tensors: Mapping[str, Writable], path: object) -> float | None:
    """The scale of the latents in a file of LDM's, which has it where training measured it (`scale_by_std`)."""
    if "scale_factor" not in tensors:
        return None
    scale = np.asarray(tensors["scale_factor"], np.float32)
    if scale.size != 1 or not np.isfinite(scale).all() or scale.item() <= 0:
        raise UserError(f"scale_factor in {path} is no positive number")
    return float(scale.item())


def networks_in(shapes: Shapes, found: Detected, path: object, scale: float | None = None) -> list[Network]:
    """All networks of a file, with the sizes that its shapes say.

    Args:
        scale: of the latents; None for the family's.

    Raises:
        UserError: a network is missing or is of a structure that is not here.
    """
    family = FAMILIES[found.family]
    side = family.v_size if family.v_size and found.prediction == "v_prediction" else family.size
    if family.kind == PIXELS:
        return [_unet_in(shapes, family, {"sample_size": side}, path)]
    has_vae = any(key.startswith(VAE) for key in shapes)
    vae = vae_in(without_prefix(shapes, VAE), family, VAE, path, scale) if has_vae else None
    factor = vae.config.factor if vae else FACTOR
    latents = side if found.family == "x4_upscaler" else side // factor
    networks = [_unet_in(shapes, family, {**family.unet, "sample_size": latents}, path)]
    if vae:
        networks.append(vae._replace(extra={**vae.extra, "sample_size": side}))
    for name, prefix in family.prefixes.items():
        is_open, projected = prefix.endswith(".model."), name == "text_encoder_2"
        below = without_prefix(shapes, prefix)
        config = _bounded(clip.original_config(below, is_open, projected, path), below, path)
        networks.append(Network(name, prefix, config, {}, clip.pieces(config, is_open)))
    return networks + _conditions_in(shapes, family.conditioning, factor, path)


def _bounded(config: Any, shapes: Shapes, path: object) -> Any:
    """The sizes of a network that is traced next, held to its tensors; a UserError where these are too few."""
    check_blocks(config.blocks, shapes, path)
    return config


def _unet_in(shapes: Shapes, family: Family, extra: Mapping[str, Any], path: object) -> Network:
    prefix = "" if family.kind == PIXELS else UNET
    below = without_prefix(shapes, prefix)
    if family.kind == STABLE_DIFFUSION or any(".transformer_blocks." in key for key in below):
        config = _bounded(unet.original_config(below, family.heads, path), below, path)
        return Network("unet", prefix, config, extra, unet.pieces(config))
    sizes = _bounded(unet2d.original_config(below, family.heads, path), below, path)
    return Network("unet", prefix, sizes, extra, unet2d.pieces(sizes, family.new_order))


def vae_in(shapes: Shapes, family: Family, prefix: str, path: object, scale: float | None = None) -> Network:
    """The autoencoder whose tensors, without `prefix`, have `shapes`.

    Raises:
        UserError: it is no autoencoder of a structure that is here.
    """
    # LDM diffuses the latents of a codebook as they are (scale_factor 1.0 in its configs).
    own = 1.0 if autoencoder.CODEBOOK in shapes else family.scaling_factor
    config = _bounded(autoencoder.original_config(shapes, own if scale is None else scale, path), shapes, path)
    return Network("vae", prefix, config, family.vae, autoencoder.pieces(config))


def _conditions_in(shapes: Shapes, conditioning: str, factor: int, path: object) -> list[Network]:
    """The network of the condition of an LDM model, if it has one."""
    below, prefix = without_prefix(shapes, COND), f"{COND}transformer."
    if conditioning in ("text_bert", "layout"):
        below = without_prefix(shapes, prefix)
        config = _bounded(embedders.original_bert(below, path), below, path)
        return [Network("bert", prefix, config, {}, embedders.bert_pieces(config))]
    if conditioning == "class_conditional":
        sizes = embedders.original_class_embedder(below, path)
        return [Network("class_embedder", COND, sizes, {}, {"embedding.weight": Piece("embedding.weight")})]
    if conditioning == "semantic_synthesis":
        sizes = embedders.original_rescaler(below, factor, path)
        return [Network("rescaler", COND, sizes, {}, {"channel_mapper.weight": Piece("channel_mapper.weight")})]
    return []


def as_expected(tensors: Mapping[str, Writable], networks: list[Network]) -> dict[str, Writable]:
    """Drop what Stable Diffusion 2 does not use of its text encoder; make attention matrices convolutions."""
    unused: tuple[str, ...] = ()
    for network in networks:
        if network.name == "text_encoder" and network.is_open_clip:
            layer = f"{network.prefix}transformer.resblocks.{network.config.layers}."
            unused = (layer, f"{network.prefix}text_projection")
    kept = {key: tensor for key, tensor in tensors.items() if not (unused and key.startswith(unused))}
    flat = {key for key, tensor in kept.items() if autoencoder.is_attention(key) and len(tensor.shape) == 2}
    return {key: SplitTensor(tensor, UNSQUEEZED) if key in flat else tensor for key, tensor in kept.items()}


def check_fit(tensors: Mapping[str, Writable], networks: list[Network], path: Path) -> None:
    """Holds a file to the networks in it, and says what else it has, e.g. what a merge of models left.

    Raises:
        UserError: tensors are missing or of another shape, or weights have scales beside them.
    """
    if scale := next((key for key in tensors if re.fullmatch(SCALES, key)), None):
        raise UserError(f"{path} is quantised: its weights are multiplied by scales ({scale}), which are not read")
    expected = {key: shape for network in networks for key, shape in network.original_shapes().items()}
    if left := check_shapes(expected, shapes_of(tensors), path, strict=False):
        belong = f"{len(left)} tensors that belong" if len(left) > 1 else "a tensor that belongs"
        logger.warning("%s holds %s to none of its networks, left out: %s", path.name, belong, listed(left))


def component_of(network: Network, tensors: Mapping[str, Writable], path: object, how: ReadOptions) -> Component:
    """A network, of tensors under their whole original keys.

    Raises:
        UserError: a value is not finite in the type asked for.
    """
    parts = inward(network.pieces, without_prefix(tensors, network.prefix))
    return Component(network.config, read_params(network.name, network.config, parts, path, how), network.extra)


def read_alone(network: Network, tensors: Mapping[str, Writable], path: Path, how: ReadOptions) -> Component:
    """The only network of a file; errors as of `check_fit` and `component_of`."""
    tensors = as_expected(tensors, [network])
    check_fit(tensors, [network], path)
    return component_of(network, tensors, path, how)


def read_autoencoder_file(
    source: Source, dtype: Dtypes = "float32", *, family: str = "sd1", place: Put | None = None
) -> Component:
    """Reads an autoencoder alone, or that of a whole checkpoint, in the original naming.

    Args:
        family: whose latents it makes; nothing in the file says it, and the scale of the latents follows from it.

    Raises:
        UserError: the file holds something else, or lacks keys.
    """
    known = [name for name, row in FAMILIES.items() if row.kind == STABLE_DIFFUSION]
    if family not in known:
        raise unknown("family", family, known)
    stored = read_file(source)
    tensors, path = wanted(stored.tensors), stored.path
    prefix = next((p for p in (VAE, "vae.") if any(key.startswith(p) for key in tensors)), "")
    tensors = without_prefix(tensors, prefix)
    if has_diffusers_names(tensors):
        raise UserError(f"{path} is an autoencoder in diffusers' naming; its config.json is not beside it")
    network = vae_in(shapes_of(tensors), FAMILIES[family], "", path)
    return read_alone(network, tensors, path, ReadOptions(dtype, place))


def has_diffusers_names(tensors: Mapping[str, Writable]) -> bool:
    """Tell whether tensors are those of an autoencoder alone, under diffusers' names."""
    return any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in tensors)


def read_adm_classifier(source: Source, dtype: Dtypes = "float32", place: Put | None = None) -> Component:
    """Reads one of the four published classifiers, known by the number of its blocks.

    Raises:
        UserError: the file is missing or corrupt, or holds none of them.
    """
    tensors, _, path = read_file(source)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("input_blocks.")}
    known = {len(row.encoder.channels) * (row.encoder.layers_per_block + 1): row for row in VARIANTS.values()}
    config = known.get(len(blocks))
    if config is None:
        raise UserError(f"{path} is none of ADM's classifiers ({', '.join(VARIANTS)}): it has {len(blocks)} blocks")
    network = Network("classifier", "", config, {}, unet2d.classifier_pieces(config))
    return read_alone(network, tensors, path, ReadOptions(dtype, place))
