"""The networks that a training config describes, and where their parameters come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sdjax.convert.components import FORMATS, TOKENIZERS, Component
from sdjax.convert.folder import read_component
from sdjax.convert.hub import resolve
from sdjax.convert.single_file import TOKENIZER_FOLDERS, read_single_file
from sdjax.convert.tokenizers import find_tokenizer
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.core.prng import stream
from sdjax.core.tree import Params, flatten, unflatten
from sdjax.data.tokenizers import Tokenizer, load_tokenizer
from sdjax.models import autoencoder, clip, unet
from sdjax.models.autoencoder import autoencoder_of
from sdjax.models.clip import TEXT_LAYERS, CLIPText, CLIPTextConfig
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet
from sdjax.tasks.latent.system import System, TextEncoder
from sdjax.training.task import Place

UNET, VAE = "unet", "vae"


def sizes_of(section: Mapping[str, Any], variants: Mapping[str, Any], place: str) -> Any:
    """A row of a table of sizes, with what the config says besides in place of the row's own.

    Args:
        section: "variant", and any field of the sizes.
        variants: of a module of `sdjax.models`.
        place: the section's name, for messages.

    Raises:
        UserError: no such variant or field.
    """
    given = dict(section)
    variant = given.pop("variant")
    if variant not in variants:
        raise unknown("variant", variant, variants, f"{place}.variant")
    fields = {field.name for field in dataclasses.fields(variants[variant])}
    for name in given:
        if name not in fields:
            raise unknown("size", name, fields, place)
    return dataclasses.replace(variants[variant], **given)


def system_of(config: Config) -> System:
    """The networks of `config.model`: `unet`, `autoencoder`, and `text_encoders` by name, each a variant.

    Raises:
        UserError: an unknown variant, size, or dtype, or text encoders that are not what the UNet attends to.
    """
    model, dtype = config.model, dtype_named(config.train.dtype, "config.train.dtype")
    sizes = sizes_of(model.unet, unet.VARIANTS, "config.model.unet")
    layer = TEXT_LAYERS["last" if sizes.vector_dim is None else "penultimate_raw"]
    encoders = [
        TextEncoder(
            name, CLIPText(sizes_of(section, clip.VARIANTS, f"config.model.text_encoders.{name}"), dtype), layer
        )
        for name, section in sorted(model.text_encoders.items())
    ]
    for encoder in encoders:
        if encoder.name not in TOKENIZERS:
            raise unknown("text encoder", encoder.name, TOKENIZERS, "config.model.text_encoders")
    system = System(
        unet=UNet(sizes, config.train.remat, dtype),
        autoencoder=autoencoder_of(sizes_of(model.autoencoder, autoencoder.VARIANTS, "config.model.autoencoder")),
        text_encoders=tuple(encoders),
        prediction=config.task.scheduler.prediction_type,
    )
    if sizes.context_dim != system.context_width:
        raise UserError(
            f"config.model: the UNet attends to {sizes.context_dim} features, the text encoders give "
            f"{system.context_width}"
        )
    return system


def configs_of(system: System) -> dict[str, Any]:
    """The sizes of every network by the name of its component."""
    named = {encoder.name: encoder.module.config for encoder in system.text_encoders}
    return {UNET: system.unet.config, VAE: system.autoencoder.config, **named}


def shapes_of(system: System, names: Iterable[str]) -> Params:
    """The parameters of some components as `jax.ShapeDtypeStruct`s."""
    return {name: FORMATS[name].shapes(config) for name, config in configs_of(system).items() if name in set(names)}


def init_component(system: System, name: str, key: PRNGKeyArray) -> dict[str, Any]:
    """Fresh parameters of one component; traceable."""
    if name == UNET:
        config = system.unet.config
        side = 2 ** (len(config.channels) - 1)
        cond = Cond(
            context=jnp.zeros((1, 1, config.context_dim)),
            vector=None if config.vector_dim is None else jnp.zeros((1, config.vector_dim)),
        )
        made = system.unet.init(key, jnp.zeros((1, side, side, config.in_channels)), jnp.zeros(1), cond)
        return dict(made["params"])
    if name == VAE:
        side = system.autoencoder.config.factor
        return dict(system.autoencoder.init(key, jnp.zeros((1, side, side, 3)), key)["params"])
    (encoder,) = (encoder for encoder in system.text_encoders if encoder.name == name)
    return dict(encoder.module.init(key, jnp.zeros((1, encoder.module.config.max_length), jnp.int32))["params"])


class Origin(NamedTuple):
    """Where components come from.

    Attributes:
        source: a Hub id, a diffusers folder or a single file; "" draws them at random, for rehearsals without weights.
        seed: of what is drawn.
    """

    source: str
    seed: int

    def read(self, system: System, names: Iterable[str], place: Place, key: str, dtype: str = "float32") -> Params:
        """The components `names`, every array placed as soon as it is read.

        Args:
            system: whose sizes they must have.
            names: e.g. ("vae", "text_encoder").
            place: puts an array onto the devices.
            key: the config's key that holds the source, for messages.
            dtype: of the arrays.

        Raises:
            UserError: they cannot be read, or have other sizes.
        """
        wanted = configs_of(system)
        names = tuple(names)
        found = self._drawn(system, names, place) if not self.source else self._stored(names, place, dtype)
        for name, component in found.items():
            if not _same(component.config, wanted[name]):
                raise UserError(
                    f"{key}: the {name} of {self.source} is {component.config}, the config describes {wanted[name]}"
                )
        return {name: dict(component.params) for name, component in found.items()}

    def _stored(self, names: Iterable[str], place: Place, dtype: str) -> dict[str, Component]:
        path = resolve(self.source)
        if path.is_dir():
            return {name: read_component(path / name, name, dtype, place=place) for name in names}
        # Of a single file every network is read; what is not asked for never reaches the devices.
        checkpoint = read_single_file(
            path, dtype, place=lambda array, at: place(array, at) if _in(at, names) else array
        )
        return {name: part for name, part in checkpoint.components.items() if name in set(names)}

    def _drawn(self, system: System, names: Iterable[str], place: Place) -> dict[str, Component]:
        found = {}
        for name in names:
            drawn = jax.jit(init_component, static_argnums=(0, 1))(system, name, stream(self.seed, "drawn", name))
            leaves = {at: place(np.asarray(leaf), f"{name}/{at}") for at, leaf in flatten(drawn).items()}
            found[name] = Component(configs_of(system)[name], unflatten(leaves))
        return found


def _same(found: Any, wanted: Any) -> bool:
    """Whether sizes are the same; checkpoints name the end of text in two ways that mean the same."""
    if isinstance(wanted, CLIPTextConfig):
        found = dataclasses.replace(found, eos_token_id=wanted.eos_token_id)
    return found == wanted


def _in(at: str, names: Iterable[str]) -> bool:
    return at.split("/", 1)[0] in set(names)


def tokenizer_folders(system: System, source: str) -> dict[str, Path]:
    """The folder with the tokenizer of each text encoder: the source's own, else CLIP's published one.

    Raises:
        UserError: the source cannot be found.
    """
    path = resolve(source) if source else None
    folders = {}
    for encoder in system.text_encoders:
        own = TOKENIZER_FOLDERS / ("clip_l" if encoder.module.config.activation == "quick_gelu" else "open_clip")
        stored = path is not None and path.is_dir()
        folders[encoder.name] = find_tokenizer(path / TOKENIZERS[encoder.name]) if path and stored else own
    return folders


def tokenizers_of(system: System, source: str) -> tuple[Tokenizer, ...]:
    """The tokenizers of the text encoders, in their order.

    Raises:
        UserError: one cannot be read.
    """
    folders = tokenizer_folders(system, source)
    return tuple(load_tokenizer(folders[e.name], e.module.config.max_length) for e in system.text_encoders)
