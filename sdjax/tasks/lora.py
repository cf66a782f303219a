"""LoRA in training: the factors that `config.task.lora` asks for, beside networks that stay as they are.

targets       keys of TARGETS, or patterns of layers, e.g. "unet/*/attn2/to_k"; () for none: no LoRA
rank, alpha, conv_rank, conv_alpha, rslora, dora, dropout, init
              `sdjax.models.lora.Adaptation`; 0 for an alpha or a rank of convolutions: as the others'
past          LoRAs that the model already has, which stay as they are: concepts learnt before
forgetting    weight of C-LoRA's penalty (Smith et al. 2024) for changing what they changed; 0 for none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.checkpoints.checkpoint import Checkpoint
from sdjax.checkpoints.lora.names import layers_of as named_layers
from sdjax.checkpoints.lora.reading import FILES, entry_of, find_file, read_lora
from sdjax.checkpoints.lora.writing import write_lora
from sdjax.checkpoints.open import resolve
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.files import atomic_write
from sdjax.core.precision import dtype_named
from sdjax.core.prng import stream
from sdjax.core.tree import Params, Tree, flatten, merge, unflatten
from sdjax.diffusion_model.conditioners import TEXT
from sdjax.diffusion_model.model import DiffusionModel
from sdjax.models.lora import FIXED, INITS, LORA, Adaptation, add_factors, layers_of, product
from sdjax.models.weight_changes import is_branch
from sdjax.parallel.trees import tree_shardings
from sdjax.training.task import DevicePut, select

TARGETS = {
    "attention": ("unet/*/attn?/to_[qkv]", "unet/*/attn?/to_out"),
    "cross_attention": ("unet/*/attn2/to_[qkv]", "unet/*/attn2/to_out"),
    "feed_forward": ("unet/*/ff/proj_*",),
    "projections": ("unet/*attentions_*/proj_*",),  # around the transformers
    "convolutions": ("unet/*resnets_*/conv*", "unet/*resnets_*/time_emb_proj", "unet/*samplers_0/conv"),
    "text_attention": ("text_encoder*/self_attn/to_*",),
    "text_feed_forward": ("text_encoder*/fc?",),
}
"""Layers by what they are. kohya-ss/sd-scripts' LoRA has all but the convolutions, diffusers' the attention."""


class Adapter(NamedTuple):
    """LoRA of a run.

    Attributes:
        patterns: of the layers that have factors; none where the run trains no LoRA.
        sizes: of the factors.
        past: factors of files before, by component.
        entries: how many files those are, so that the run's own entry has this number for its name.
        forgetting: weight of the penalty.
    """

    patterns: tuple[str, ...] = ()
    sizes: Adaptation = Adaptation()
    past: Params = {}  # noqa: RUF012  (nobody writes into it)
    entries: int = 0
    forgetting: float = 0.0

    @property
    def entry(self) -> str:
        """Name of the run's own entries."""
        return str(self.entries)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Patterns of all that the run learns; () where it trains no LoRA."""
        return (f"*/{LORA}/{self.entry}/*",) if self.patterns else ()

    def added(self, params: Params, key: PRNGKeyArray) -> Params:
        """The tree with fresh factors of the run and those before it; traceable.

        Raises:
            UserError: a pattern names no layer.
        """
        return merge(add_factors(params, self.patterns, self.sizes, key, self.entry), self.past)

    def given(self, params: Params, put: DevicePut, mesh: Mesh) -> Params:
        """Leaves of factors that do not begin from random numbers: scales, DoRA's magnitudes, and all of the past.

        Args:
            params: of the networks that have factors.
            put, mesh: of `Task.pretrained`; magnitudes are made where the kernels are.
        """
        if not self.patterns:
            return {}
        own = (*FIXED, f"*/{LORA}/{self.entry}/magnitude")

        def fixed(params: Params) -> Params:
            return select(self._replace(past={}).added(params, stream(0)), own)[0]

        made = jax.jit(fixed, out_shardings=tree_shardings(jax.eval_shape(fixed, params), mesh))(params)
        past = {path: put(leaf, path) for path, leaf in flatten(self.past).items()}
        return merge(made, unflatten(past))

    def penalty(self, params: Params) -> Float[Array, ""]:
        """The sum of (|changes before| x own change)^2 over all weights (Smith et al. 2024, "Continual Diffusion", the
        self-regularisation of eq. 4), by the weight of it."""
        return self.forgetting * sum((_overlap(layer, self.entry) for layer in _adapted(params)), jnp.zeros(()))


def _adapted(params: Tree) -> list[Any]:
    return [layer for _, layer in layers_of(params) if LORA in layer]


def _overlap(layer: Tree, entry: str) -> Array:
    changes = {name: factors["scale"] * product(factors) for name, factors in layer[LORA].items()}
    own = changes.pop(entry, jnp.zeros(()))
    return jnp.square(jnp.abs(sum(changes.values(), jnp.zeros(()))) * own).sum()


def adapter_of(config: Config, model: DiffusionModel) -> Adapter:
    """The LoRA that a config describes, with the factors of those before it.

    Raises:
        UserError: a setting is out of its range; as `read_past`.
    """
    section = config.task.get(LORA)
    if not section or not section.targets:
        return Adapter()
    if config.task.conditioning != TEXT:
        raise UserError(
            f"config.task.lora.targets={tuple(section.targets)}: files of LoRA name Stable Diffusion's layers; a model "
            f"of {config.task.conditioning} is fine-tuned by config.train.trainable"
        )
    if section.rank < 1:
        raise UserError(f"config.task.lora.rank={section.rank} must be at least 1")
    if section.init not in INITS:
        raise unknown("init", section.init, INITS, "config.task.lora.init")
    if not 0.0 <= section.dropout < 1.0:
        raise UserError(f"config.task.lora.dropout={section.dropout} must be at least 0 and less than 1")
    patterns = tuple(pattern for target in section.targets for pattern in TARGETS.get(target, (target,)))
    sizes = Adaptation(**{name: section[name] or default for name, default in Adaptation()._asdict().items()})
    return Adapter(patterns, sizes, read_past(section.past, model), len(section.past), section.forgetting)


def read_past(sources: Sequence[str], model: DiffusionModel) -> Params:
    """Factors of files, as entries "0", "1", ... of a tree of parameters.

    Raises:
        UserError: a file cannot be read, does not fit the model, or changes weights, which training leaves alone.
    """
    layers, leaves = named_layers(model.configs()), dict[str, Any]()
    for i, source in enumerate(sources):
        file = read_lora(find_file(resolve(source)), layers)
        for path in file.layers:
            entry = entry_of(file, layers[path])
            if not is_branch(entry):
                own = ", ".join(sorted(entry))
                raise UserError(
                    f"config.task.lora.past: {source} changes weights, e.g. of {path} by {own}; merge it into the base"
                )
            leaves |= {f"{path}/{LORA}/{i}/{name}": np.asarray(leaf, np.float32) for name, leaf in entry.items()}
    return unflatten(leaves)


def write_adapter(checkpoint: Checkpoint, folder: Path, config: Config, entry: str, export_dtype: str) -> None:
    """Write factors into a new folder, in diffusers' naming and in kohya's, and a card of what they are for.

    Args:
        checkpoint: with the factors among its parameters.
        entry: name of theirs.
        export_dtype: of the numbers; "" for float32.

    Raises:
        UserError: they cannot be written, or are not finite in `export_dtype`.
    """
    dtype = dtype_named(export_dtype or "float32")
    params = {name: part.params for name, part in checkpoint.components.items()}
    factors = {path: layer[LORA][entry] for path, layer in layers_of(params) if entry in layer.get(LORA, {})}
    with atomic_write(folder) as partial:
        partial.mkdir()
        write_lora(partial / FILES[0], checkpoint, factors, "diffusers", dtype=dtype)
        write_lora(partial / f"{KOHYA}.safetensors", checkpoint, factors, "kohya", training_facts(config), dtype)
        (partial / "README.md").write_text(card(config, factors), "utf-8")


KOHYA = "kohya"
"""Name of the file in kohya's naming."""


def training_facts(config: Config) -> dict[str, str]:
    """Metadata of kohya's about the training."""
    size, train, optim = config.data.size, config.train, config.optim
    return {
        "ss_sd_model_name": Path(config.task.initial or "random").name,
        "ss_resolution": f"({size}, {size})",
        "ss_steps": str(train.steps),
        "ss_seed": str(train.seed),
        "ss_learning_rate": str(optim.learning_rate),
        "ss_optimizer": optim.name,
        "ss_batch_size_per_device": str(train.batch_size),
        "ss_noise_offset": str(config.task.offset_noise),
        "modelspec.resolution": f"{size}x{size}",
    }


CARD = """---
base_model: {base}
library_name: diffusers
tags: [lora, text-to-image, jax, flax]
---
# LoRA for {base}

{layers} layers, rank {rank}, {count:,} parameters, trained for {steps:,} steps of {batch} images of {size} px.

```python
pipe = sdjax.load({base!r}, lora=["{file}"])  # sdjax
pipe.load_lora_weights("{file}")  # diffusers
```
`{kohya}.safetensors` holds the same in the naming of kohya-ss/sd-scripts.
"""


def card(config: Config, factors: Mapping[str, Mapping[str, Any]]) -> str:
    """The README.md of an export."""
    count = sum(leaf.size for entry in factors.values() for leaf in entry.values() if leaf.ndim)
    return CARD.format(
        base=config.task.initial or "its base",
        layers=len(factors),
        rank=config.task.lora.rank,
        count=count,
        steps=config.train.steps,
        batch=config.train.batch_size,
        size=config.data.size,
        file=FILES[0],
        kohya=KOHYA,
    )
