"""Words of textual inversions: their files, read and written, and the checkpoint whose prompts know them.

Written are `learned_embeds.safetensors` and, of SDXL's second encoder, `learned_embeds_2.safetensors`, as diffusers has
them, of several words `WORD.safetensors`; and for A1111, ComfyUI and kohya-ss/sd-scripts `webui/WORD.safetensors`, with
`emb_params`, or `clip_l` and `clip_g`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdjax.checkpoints.checkpoint import Checkpoint, Patch, check_text_encoders, tokenizers_of
from sdjax.checkpoints.embedding_images import SUFFIXES as IMAGES
from sdjax.checkpoints.embedding_images import read_embedding_image
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.checkpoints.storage.weights import read_groups
from sdjax.core.errors import UserError
from sdjax.data.text.textual_inversion import ENCODERS, UNNAMED, Embedding, fit, read_embedding
from sdjax.models.clip import extend_vocabulary

LEARNED, SECOND = "learned_embeds", "_2"
SUFFIXES = (".safetensors", ".bin", ".pt", *IMAGES)
OTHERS = ("pytorch_", f"{LEARNED}-steps-")
"""What the names of files begin with that stand in a run's folder beside its last words."""
WEBUI = "webui"
UNFIT = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
"""Characters that no file's name may have on every system."""


def add_embeddings(files: Sequence[str | Path]) -> Patch:
    """Words of textual inversions for text encoders and tokenizers.

    Args:
        files: local `.safetensors`, `.pt` or `.bin` files, A1111's images, or folders with such.

    Raises:
        UserError: by the patch, where a file is missing or not for these text encoders, or a word is there already.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        check_text_encoders(checkpoint)
        return add_words([word for source in files for word in read_embeddings(Path(source))])(checkpoint)

    return patch


def add_words(embeddings: Sequence[Embedding]) -> Patch:
    """Words with their vectors for text encoders and tokenizers.

    Raises:
        UserError: by the patch, where vectors are not for these text encoders, or a word is there already.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        names = check_text_encoders(checkpoint)
        parts = [checkpoint.components[name] for name in names]
        fitted = fit(embeddings, [part.config.width for part in parts])
        if again := sorted(set(fitted.counts) & set(checkpoint.placeholders)):
            raise UserError(f"there are two textual inversions for the word {again[0]!r}")
        extended = {}
        for name, part, tokenizer, rows in zip(names, parts, tokenizers_of(checkpoint), fitted.rows, strict=True):
            config, params = extend_vocabulary(part.config, part.params, rows, tokenizer.eos)
            extended[name] = dataclasses.replace(part, config=config, params=params)
        components, counts = {**checkpoint.components, **extended}, {**checkpoint.placeholders, **fitted.counts}
        return dataclasses.replace(checkpoint, components=components, placeholders=counts)

    return patch


def read_embeddings(source: Path) -> list[Embedding]:
    """The word of a file, or all words of a folder's files.

    Raises:
        UserError: there is none, or a file is no textual inversion.
    """
    if source.is_dir():
        files = [path for path in source.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(OTHERS)]
        words = _read(sorted(files))
    elif source.is_file():
        words = _read([path for path in (source, _second(source)) if path.is_file()])[:1]
    else:
        raise UserError(f"there is no textual inversion {str(source)!r}")
    if not words:
        raise UserError(f"{source} holds no textual inversion, such as {LEARNED}{SUFFIXES[0]}")
    return words


def _read(files: Sequence[Path]) -> list[Embedding]:
    """Words of files; SDXL's second encoder has its vectors under the same word in the file that `_second` names.

    Images without words, such as previews beside other files, are passed over, as by A1111.
    """
    read = {file: embedding for file in files if (embedding := _read_one(file)) is not None}
    pairs = {file: _second(file) for file in files if _second(file) in read}
    pairs = {file: second for file, second in pairs.items() if read[file].word == read[second].word}
    for file, second in pairs.items():
        read[file] = read[file]._replace(vectors=read[file].vectors + read[second].vectors)
    return [embedding for file, embedding in read.items() if file not in pairs.values()]


def _read_one(file: Path) -> Embedding | None:
    if file.suffix not in IMAGES:
        return read_embedding(read_groups(file), file.stem)
    content = read_embedding_image(file)
    return None if content is None else read_embedding(content, content["name"])


def _second(file: Path) -> Path:
    return file.with_stem(file.stem + SECOND)


def write_embeddings(folder: Path, embeddings: Sequence[Embedding], *, by_word: bool = False) -> None:
    """Write words as diffusers reads them, and for web UIs, which call a word by its file's name.

    Args:
        by_word: a single word's file is called by it, too, as Custom Diffusion's are.

    Raises:
        UserError: as `file_names` and `write_safetensors`.
    """
    names = file_names([embedding.word for embedding in embeddings], by_word=by_word)
    for name, embedding in zip(names, embeddings, strict=True):
        for ending, vectors in zip(("", SECOND), embedding.vectors, strict=False):
            write_safetensors(folder / f"{name}{ending}.safetensors", {embedding.word: vectors}, np.float32)
        (folder / WEBUI).mkdir(exist_ok=True)
        keys: tuple[str, ...] = ENCODERS if len(embedding.vectors) > 1 else UNNAMED
        tensors: dict[str, np.ndarray] = dict(zip(keys, embedding.vectors, strict=False))
        write_safetensors(folder / WEBUI / f"{web_name(embedding.word)}.safetensors", tensors, np.float32)


def file_names(words: Sequence[str], *, by_word: bool = False) -> list[str]:
    """Names of words' files without their suffixes; `by_word` as of `write_embeddings`.

    Raises:
        UserError: a word cannot be a file's name, or two would have the same.
    """
    names = [LEARNED] if len(words) == 1 and not by_word else list(words)
    if unfit := [name for name in names if "/" in name]:
        raise UserError(f"word {unfit[0]!r} cannot be the name of a file, with a '/' in it; choose another word")
    for word in words:
        if f"{word}{SECOND}" in words:
            raise UserError(f"word '{word}{SECOND}' is the name of a file of {word!r}; choose another word")
        if same := [other for other in words if other != word and web_name(other) == web_name(word)]:
            raise UserError(
                f"words {word!r} and {same[0]!r} have the same file {web_name(word)!r}; choose another word"
            )
    return names


def web_name(word: str) -> str:
    """A word as web UIs call it in prompts: a file's name."""
    return UNFIT.sub("", word) or "word"
