"""Prompts through frozen or trained text encoders: Stable Diffusion 1, 2 and XL (Podell et al. 2023, section 2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.text.prompts import chunk, plain, stack
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.diffusion.denoise import per_image
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits
from sdjax.diffusion_model.text_encoders import TextEmbeddings, TextEncoder
from sdjax.models.conditioning import Cond
from sdjax.models.layers import timestep_embedding

SIZES, AESTHETICS = 6, 5
"""Numbers of SDXL's micro-conditioning: original size, crop, target size for its base; an aesthetic score in place of
the target size for its refiner (SDXL, section 2.2; Stability-AI/generative-models, configs/inference)."""
NULL = "null"
"""Component of frozen arrays: the embeddings of the null condition, where embeddings were precomputed."""
SIDES = ("", "negative_")
"""Prefixes of the columns of prompts and of negative prompts."""
READERS = {"a1111": chunk, "plain": plain}
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5

logger = logging.getLogger("sdjax")


@dataclass(frozen=True)
class TextConditioner(Conditioner):
    """`ids` int32 and `weights` float [b e n l] of e encoders, `keep` float [b], `numbers` float [b k].

    `keep` is 1 for the prompt and 0 for the null condition. Sampling has `negative_*` columns beside them. Precomputed
    embeddings (`context`, `pooled`) may take the place of ids. Where prompt and negative prompt are lists, an image has
    as many rows of all these columns.

    Attributes:
        encoders: in the order in which their features are joined.
        numbers: of SDXL's micro-conditioning (diffusers' add_time_ids): `SIZES`, `AESTHETICS` or 0. While training they
            are the column `sizes` of `data.transforms.buckets.ToBucket`.
        number_width: sinusoidal features of each number.
        null_ids: token ids of the empty prompt, one row an encoder: the null condition of SD 1 and 2. () for models
            whose null condition is zeros, as SDXL's base was trained.
    """

    encoders: tuple[TextEncoder, ...] = ()
    numbers: int = 0
    number_width: int = 256
    null_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def traits(self) -> Traits:
        sizes = ("original_size", "crop")
        own = {SIZES: (*sizes, "target_size"), AESTHETICS: (*sizes, "aesthetic_score", "negative_aesthetic_score")}
        return Traits(
            required=("prompt",),
            optional=("negative_prompt", "syntax", "wildcard_dir", "clip_skip", *own.get(self.numbers, ())),
            context_width=sum(encoder.width for encoder in self.encoders),
            has_null=True,
            guidance_scale=7.5,
            prompt_columns=("clip_skip", *(f"{side}{name}" for side in SIDES for name in self._column_names)),
        )

    @property
    def _column_names(self) -> tuple[str, ...]:
        return ("ids", "weights", "keep", *(["numbers"] if self.numbers else []))

    @property
    def components(self) -> dict[str, Any]:
        return {encoder.name: encoder.config for encoder in self.encoders}

    @property
    def pooled_width(self) -> int:
        """Features of the pooled prompt."""
        return self.encoders[-1].pooled_width

    def init(self, key: PRNGKeyArray) -> Params:
        keys = jax.random.split(key, len(self.encoders))
        return {encoder.name: encoder.init(own) for encoder, own in zip(self.encoders, keys, strict=True)}

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        skip = inputs.get("clip_skip") or 0
        most = min(encoder.max_skip for encoder in self.encoders)
        if skip > most:
            raise UserError(f"clip_skip {skip} does not fit this text encoder; choose 0 to {most}")
        several = not isinstance(inputs["prompt"], str)
        prompts, negatives = (inputs[n] if several else [inputs.get(n)] for n in ("prompt", "negative_prompt"))
        count = len(prompts)
        tokenizers = [host.tokenizers[encoder.name] for encoder in self.encoders]
        texts = [*prompts, *(negative or "" for negative in negatives)]
        ids, weights = read_prompts(tokenizers, texts, inputs["syntax"])  # pyright: ignore
        columns = {"clip_skip": np.full(count, skip, np.int32)}
        for row, side in enumerate(SIDES):
            # SDXL's base was trained with zeros in place of dropped embeddings, so a missing negative prompt is them.
            zeros = [bool(row) and negative is None and not self.null_ids for negative in negatives]
            rows = slice(row * count, (row + 1) * count)
            own = {"ids": ids[rows], "weights": weights[rows], "keep": 1.0 - np.array(zeros, np.float32)}
            if self.numbers:
                own["numbers"] = np.array([self._numbers(inputs, host.size, bool(row))] * count, np.float32)
            columns |= {f"{side}{name}": value for name, value in own.items()}
        return columns if several else {name: values[0] for name, values in columns.items()}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        text = self.embeddings(params, columns)
        if not self.numbers:
            return Cond(context=text.context)
        numbers = jnp.asarray(columns["numbers"])
        sinusoids = timestep_embedding(numbers.reshape(-1), self.number_width).reshape(len(numbers), -1)
        return Cond(context=text.context, vector=jnp.concatenate([text.pooled.astype(jnp.float32), sinusoids], -1))

    def embeddings(self, params: Params, columns: Columns) -> TextEmbeddings:
        """Context and pooled vector; those of the null condition where `keep` is 0."""
        keep = jnp.asarray(columns["keep"]) > 0.0
        if "context" in columns:
            found = {name: jnp.asarray(columns[name], jnp.float32) for name in params[NULL]}
            mixed = {name: jnp.where(per_image(keep, x), x, params[NULL][name]) for name, x in found.items()}
            return TextEmbeddings(mixed["context"], mixed.get("pooled", jnp.zeros((len(keep), 0))))
        ids, weights = jnp.asarray(columns["ids"]), columns.get("weights")
        if self.null_ids:
            ids = jnp.where(per_image(keep, ids), ids, np.array(self.null_ids, np.int32)[:, None])
        skip = jnp.asarray(columns["clip_skip"]) if "clip_skip" in columns else None
        made = [
            encoder.encode(params, ids[:, i], None if weights is None else jnp.asarray(weights)[:, i], skip)
            for i, encoder in enumerate(self.encoders)
        ]
        text = TextEmbeddings(jnp.concatenate([one.context for one in made], axis=-1), made[-1].pooled)
        if self.null_ids:
            return text
        return TextEmbeddings(*(x * per_image(keep, x).astype(x.dtype) for x in text))

    def null(self, columns: Columns) -> Columns:
        if "negative_ids" in columns:
            return {name: columns.get(f"negative_{name}", column) for name, column in columns.items()}
        return {**columns, "keep": jnp.zeros_like(jnp.asarray(columns["keep"]))}

    def _numbers(self, inputs: Mapping[str, Any], size: tuple[int, int], negative: bool) -> list[float]:
        """SDXL's micro-conditioning (diffusers, `_get_add_time_ids`)."""
        original, target = (inputs.get(name) or size for name in ("original_size", "target_size"))
        numbers = [*original, *(inputs.get("crop") or (0, 0))]
        if self.numbers == SIZES:
            return [*numbers, *target]
        score = inputs.get("negative_aesthetic_score" if negative else "aesthetic_score")
        return [*numbers, (NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE) if score is None else score]


def read_prompts(tokenizers: Sequence[Tokenizer], prompts: Sequence[str], syntax: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and weights [p e n l] of prompts, all in as many chunks as the longest needs.

    What was cut or is not understood is said in the log.
    """
    read = [[READERS[syntax](tokenizer, prompt) for prompt in prompts] for tokenizer in tokenizers]
    longest = max(len(chunks.ids) for rows in read for chunks, _ in rows)
    pairs = zip(tokenizers, read, strict=True)
    encoded = [stack(tokenizer, [chunks for chunks, _ in rows], longest) for tokenizer, rows in pairs]
    for prompt, (_, reports) in dict(zip(prompts, read[0], strict=True)).items():
        for report in reports:
            problem = "was cut from" if report.kind == "cut" else "is not understood in"
            logger.warning("%r %s the prompt %.40r: %s", report.text, problem, prompt, report.why)
    return np.stack([each.ids for each in encoded], 1), np.stack([each.weights for each in encoded], 1)
