"""Computes latents and text embeddings once, for the training that reads them many times.

    python -m sdjax.prepare --config configs/stable_diffusion_training.py:sdxl --outdir DATA --config.data.source=SOURCE

SOURCE is what `--config.data.source` takes everywhere: openmoji, tfds:NAME, folder:PATH, webdataset:PATTERN or
array_record:PATTERN. Of several captions of an image one is drawn and stored. Run it again after an interruption and it
computes what is missing; run it on several hosts, with the flags or the environment of a cluster (docs/cluster.md), and
each computes its part.
    --batch_size 16                images encoded at a time, on each device
    --coordinator HOST:PORT --processes N --process_id I       by hand, where the environment does not say
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from tqdm import tqdm

from sdjax.core.compilation import keep_compiled
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.flags import define_processes, parse_flags, processes
from sdjax.core.scripts import require
from sdjax.core.tree import Params
from sdjax.data.loader import Shard
from sdjax.data.prepared.writer import PreparedRow, PreparedWriter, Range
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.data.transforms import buckets
from sdjax.data.transforms.conditions import DRAW_CAPTION
from sdjax.diffusion_model.model import AUTOENCODER, DiffusionModel
from sdjax.parallel.batches import local_mesh, put_batch, replicated_put
from sdjax.parallel.distributed import end_by_signals, initialise, run_together, sync
from sdjax.tasks.base import open_images
from sdjax.tasks.diffusion import make_model
from sdjax.tasks.precompute import (
    STORED,
    encode_captions,
    encode_moments,
    identity_of,
    null_embeddings,
    text_conditioner,
)
from sdjax.tasks.pretrained import frozen_source, read_components

TABLES: dict[str, Callable[[int, int], buckets.Table]] = {
    "square": lambda size, step: (buckets.Size(size, size),),
    "aspect": lambda size, step: buckets.SDXL if (size, step) == (1024, 64) else buckets.table(size, step),
}
"""What `data.buckets` may be: of `data.size` and `data.bucket_step` the sizes of images."""


def main() -> None:
    """Reads the command line and prepares."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    flags.DEFINE_string("outdir", None, "the folder to write", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "images a device encodes at a time", lower_bound=1, flag_values=values)
    define_processes(values)
    parse_flags(values, sys.argv, __doc__)
    config, folder = require(values, "config"), Path(require(values, "outdir"))
    keep_compiled()
    end_by_signals()
    initialise(**processes(values))
    prepare(config, folder, require(values, "batch_size"))


def prepare(config: Config, folder: Path, batch_size: int = 16) -> None:
    """Writes what `sdjax.data.prepared.dataset.PreparedSource` reads.

    Args:
        config: of prepared latents; its `data` says of which images, and how they are cut.
        folder: where to.
        batch_size: images a device encodes at a time.

    Raises:
        UserError: the config, the images or the folder are not what they should be, or a row is not finite.
    """
    config = config.copy_and_resolve_references()
    if config.task.get("latents") != "prepared":
        raise UserError(f"config.task.latents is {config.task.get('latents')!r}; data is made for 'prepared'")
    if config.data.buckets not in TABLES:
        raise unknown("buckets", config.data.buckets, TABLES, "config.data.buckets")
    images = open_images(config)
    table = TABLES[config.data.buckets](config.data.size, config.data.bucket_step)
    if len(table) > 1:  # a batch is of one bucket, so a bucket has a batch at least
        table = buckets.occupied(images, table, config.train.batch_size)
    encoder = make_encoder(config, batch_size)
    identity = {
        **identity_of(config, encoder.model),
        **{name: config.data[name] for name in ("source", "size", "crop")},
        "seed": config.train.seed,
    }
    shard = Shard(jax.process_index(), jax.process_count())
    writer = PreparedWriter(folder, identity, table, len(images), config.data.rows_per_shard, shard)
    cut = grain.MapDataset.source(images).seed(config.train.seed).random_map(buckets.ToBucket(table, config.data.crop))
    cut = cut.random_map(DRAW_CAPTION)  # of several captions one is stored
    parts = list(writer.pending())
    with tqdm(total=sum(part.stop - part.start for part in parts), unit="picture", dynamic_ncols=True) as bar:
        for part in parts:
            writer.write(part, encoder.rows(cut, part, bar.update))
    sync("prepared")
    writer.finish(encoder.constants())


class BatchEncoder(NamedTuple):
    """The networks, on this process's devices, and what they make of images.

    Attributes:
        model, params, tokenizers: the networks.
        text: "prepared" where embeddings are stored, else tokens.
        batch: images at a time.
        mesh: of this process's devices.
    """

    model: DiffusionModel
    params: Params
    tokenizers: tuple[Tokenizer, ...]
    text: str
    batch: int
    mesh: Mesh

    def rows(self, examples: grain.MapDataset, part: Range, done: Callable[[int], Any]) -> Iterator[PreparedRow]:
        """The rows of a range in its order; `done` is called with the number encoded."""
        reading = grain.ReadOptions(num_threads=4, prefetch_buffer_size=2 * self.batch)
        made: dict[int, PreparedRow] = {}
        waiting: dict[int, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
        for index, example in enumerate(examples[part.start : part.stop].to_iter_dataset(reading)):
            group = waiting[int(example["bucket"])]
            group.append((index, example))
            if len(group) == self.batch:
                made.update(self._encode(group))
                done(len(group))
                group.clear()
        for group in waiting.values():
            if group:
                made.update(self._encode(group))
                done(len(group))
        return (made[index] for index in range(part.stop - part.start))

    def constants(self) -> dict[str, np.ndarray]:
        """Embeddings of the null condition, where embeddings are stored."""
        return null_embeddings(self.model, self.params, self._tokens([""])[0]) if self.text == "prepared" else {}

    def _encode(self, group: list[tuple[int, Mapping[str, Any]]]) -> Iterable[tuple[int, PreparedRow]]:
        missing = self.batch - len(group)
        images = np.stack([example["image"] for _, example in group] + [group[-1][1]["image"]] * missing)
        captions = [example["caption"] for _, example in group] + [""] * missing
        tokens = self._tokens(captions)
        batch = put_batch({"images": images, "tokens": tokens}, self.mesh)
        made = {"moments": _moments(self.model, self.params, batch["images"])}
        made |= _captions(self.model, self.params, batch["tokens"]) if self.text == "prepared" else {"tokens": tokens}
        arrays = {name: np.asarray(values) for name, values in made.items()}
        for place, (index, example) in enumerate(group):
            row = {name: values[place] for name, values in arrays.items()}
            for name, values in row.items():
                if not np.isfinite(values).all():
                    raise UserError(f"the {name} of {example['id']} are not finite in {np.dtype(STORED).name}")
            if text_conditioner(self.model).numbers:
                row["sizes"] = example["sizes"]
            yield index, PreparedRow(int(example["bucket"]), example["id"], row)

    def _tokens(self, captions: list[str]) -> np.ndarray:
        return np.stack([tokenizer.encode(captions) for tokenizer in self.tokenizers], axis=1)


@partial(jax.jit, static_argnums=0)
def _moments(model: DiffusionModel, params: Params, images: jax.Array) -> jax.Array:
    return encode_moments(model, params, images).astype(STORED)


@partial(jax.jit, static_argnums=0)
def _captions(model: DiffusionModel, params: Params, tokens: jax.Array) -> dict[str, jax.Array]:
    return {name: value.astype(STORED) for name, value in encode_captions(model, params, tokens).items()}


def make_encoder(config: Config, batch_size: int) -> BatchEncoder:
    """The frozen networks of a config, whole on each of this process's devices.

    Raises:
        UserError: they cannot be read, or are not those that the config describes.
    """
    (model, condition), mesh = make_model(config), local_mesh()
    prepared = config.task.text == "prepared"
    names = [AUTOENCODER, *(condition.tokenizers if prepared else ())]
    key, source = frozen_source(config.task)
    params = read_components(source, model, names, replicated_put(mesh), f"config.task.{key}", config.train.seed)
    tokenizers = tuple(condition.loaded[name] for name in condition.tokenizers)
    text = "prepared" if prepared else "tokens"
    return BatchEncoder(model, params, tokenizers, text, batch_size * mesh.size, mesh)


if __name__ == "__main__":
    run_together(main)
