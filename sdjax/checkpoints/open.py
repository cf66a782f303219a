"""Opening checkpoints by name, of the Hub or local, folders or files; and changing them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdjax.checkpoints.checkpoint import (
    ALL_FORMATS,
    CONDITIONERS,
    CONTROLNET,
    FORMATS,
    TOKENIZER_FILES,
    TOKENIZERS,
    Checkpoint,
    Component,
    Dtypes,
    Format,
    Patch,
    family_of,
    with_word_pieces,
)
from sdjax.checkpoints.families import FAMILIES, PREDICTIONS, UNET, kind_of_shapes
from sdjax.checkpoints.kinds import PIXELS, STABLE_DIFFUSION
from sdjax.checkpoints.layouts.diffusers import (
    FIRST_STAGE,
    INDEX,
    NOISING,
    class_of_index,
    present,
    read_component,
    read_folder,
)
from sdjax.checkpoints.layouts.original import (
    detect,
    has_diffusers_names,
    read_autoencoder_file,
    read_single_file,
    shapes_of,
)
from sdjax.checkpoints.mapping import Put
from sdjax.checkpoints.storage.hub_answers import check_answers
from sdjax.checkpoints.storage.safetensors import read_weight_map
from sdjax.checkpoints.storage.weights import SUFFIXES, Source, Weights, candidates, read_file
from sdjax.core.config import EXPORT
from sdjax.core.errors import UserError, unknown
from sdjax.core.untrusted import read_json
from sdjax.data.text.t5_tokenizer import OTHER_FILE
from sdjax.data.text.word_pieces import FILE
from sdjax.models.autoencoder import has_same_scale

WEIGHTS = (".safetensors", *SUFFIXES)
# The bases: all that the HTTP client of the hub's version raises, and OSError.
FAILURES = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>[^@]+))?(@(?P<revision>[\w./-]+))?")
NETWORKS = {**FORMATS, FIRST_STAGE: FORMATS["vae"], **CONDITIONERS, CONTROLNET: ALL_FORMATS[CONTROLNET]}
CONFIG = "config.json"
SETTINGS = (
    INDEX,
    CONFIG,
    "*.index*.json",
    "scheduler/*.json",
    *(f"{folder}/*.json" for folder in sorted(set(NOISING.values()))),
    *(f"{name}/{CONFIG}" for name in NETWORKS),
    *(f"{folder}/{file}" for folder in TOKENIZERS.values() for file in (*TOKENIZER_FILES, FILE, OTHER_FILE)),
)


class Location(NamedTuple):
    """A repository of the Hub, or a file or a component of one, and where to look for it; None is the default."""

    repo: str
    file: str | None
    revision: str | None
    cache: Path | None
    endpoint: str | None
    component: str | None

    def __str__(self) -> str:
        return f"{self.repo}{f'@{self.revision}' if self.revision else ''}"


def resolve(
    source: str | Path,
    *,
    variant: str | None = None,
    component: str | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The local folder or file that `source` means.

    Args:
        source: a local path, where the workdir of a finished run means its export; or `owner/name`, a model of the
            Hub, or `owner/name/file.safetensors`, a file there, weights or a config.json; either may end in
            `@revision`. Of a model only what is read here is downloaded, one precision of it.
        variant: e.g. "fp16": weights of that name are taken where there are some.
        component: the only network that is wanted, e.g. "vae"; the source may then be the folder of such a one alone.
        cache_dir, endpoint: instead of those that HF_HOME and HF_ENDPOINT name.

    Raises:
        UserError: there is no such path, model or file, it is gated, or neither the network nor the cache has it.
    """
    path = Path(os.path.expanduser(source))  # pathlib's own fails for users that there are none of
    if str(source) and os.path.exists(path):  # and so does its `exists`, for names that are too long
        return within_workdir(path)
    match = ID.fullmatch(str(source))
    name = match["repo"] if match else ""
    file = match["file"] if match else None
    if match is None or name.endswith(WEIGHTS) or (file is not None and not file.endswith((*WEIGHTS, CONFIG))):
        raise UserError(f"there is no file or folder {str(source)!r}, nor is it an id of the Hub (owner/name)")
    place = Location(name, file, match["revision"], cache_dir, endpoint, component)
    check_answers()
    try:
        folder = _folder(place, variant)
    except FAILURES as error:
        raise UserError(_reason(place, error)) from error
    return folder if file is None else folder / file


def within_workdir(path: Path) -> Path:
    """The export of a finished run's workdir; any other path as it is."""
    return path / EXPORT if (path / EXPORT).is_dir() and not (path / INDEX).exists() else path


def _folder(place: Location, variant: str | None) -> Path:
    """The folder of the cache with a repository, after the files that are wanted of it are there."""
    try:  # fails at once where there is no network; to list the files in other ways is tried for half a minute
        info = HfApi(endpoint=place.endpoint).model_info(place.repo, revision=place.revision)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except FAILURES as error:
        return _cached(place, variant, error)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if place.file is not None:
        if place.file not in names:
            raise UserError(f"{place} has no file {place.file!r}")
        return _download(place, _with_settings(place.file))
    if INDEX not in names and not (place.component and CONFIG in names):
        files = [f"{place.repo}/{name}" for name in names if name.endswith(WEIGHTS)]
        hint = f"give one of its files: {', '.join(files[:5])}" if files else "it holds no weights either"
        raise UserError(f"{place} has no {INDEX}, so it is no diffusers folder; {hint}")
    folder = _download(place, SETTINGS)
    return _download(place, (*SETTINGS, *_weight_files(folder, names, place, variant)))


def _with_settings(file: str) -> tuple[str, ...]:
    """A file, and what may stand beside it: LDM's config, as the file is named, or a network's."""
    path = PurePosixPath(file)
    return file, str(path.with_suffix(".yaml")), str(path.with_name(CONFIG))


def _download(place: Location, patterns: Collection[str], local: bool = False) -> Path:
    return Path(
        snapshot_download(
            place.repo,
            revision=place.revision,
            cache_dir=place.cache,
            endpoint=place.endpoint,
            allow_patterns=list(patterns),
            local_files_only=local,
        )
    )


def _cached(place: Location, variant: str | None, error: Exception) -> Path:
    """The folder that an earlier download left; `error` is why there is no other."""
    try:
        folder = _download(place, SETTINGS if place.file is None else _with_settings(place.file), local=True)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        wanted = list(_weight_files(folder, names, place, variant)) if place.file is None else [place.file]
    except (LocalEntryNotFoundError, UserError):
        raise UserError(_reason(place, error)) from error
    if any(name not in names for name in wanted):
        raise UserError(_reason(place, error)) from error
    return folder


def _weight_files(folder: Path, names: Collection[str], place: Location, variant: str | None) -> Iterator[str]:
    """The weights of every network that is wanted; `folder` holds the settings."""
    for part, form in _wanted(folder, place).items():
        found = next((f"{part}{f}" for f in candidates(form.weights, variant) if f"{part}{f}" in names), None)
        if found is None:
            raise UserError(f"{place} holds no weights of its {part[:-1] or place.component}, no .safetensors nor .bin")
        yield found
        if found.endswith(".json"):
            yield from sorted({f"{part}{file}" for file in read_weight_map(folder / found).values()})


def _wanted(folder: Path, place: Location) -> dict[str, Format]:
    """The format of each network that is wanted, by its folder, e.g. "unet/"; "" for a network alone."""
    if place.component and not (folder / INDEX).is_file():
        return {"": ALL_FORMATS[place.component]}
    index, own = read_json(folder / INDEX), (place.component, FIRST_STAGE if place.component == "vae" else None)
    names = [name for name in NETWORKS if present(index, name) and (place.component is None or name in own)]
    return {f"{name}/": NETWORKS[name] for name in names}


def _reason(place: Location, error: Exception) -> str:
    """One line on why a download failed."""
    where = place.endpoint or "https://huggingface.co"
    if isinstance(error, GatedRepoError):
        return f"{place} is gated: accept its terms at {where}/{place.repo}, then log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {place.repo} on the Hub, nor a local path of that name; if it is private, log in first"
    if isinstance(error, RevisionNotFoundError):
        return f"{place.repo} has no revision {place.revision!r}"
    said = " ".join(str(error.__cause__ or error).split())[:150] or type(error).__name__
    what = f"{place.repo}/{place.file}" if place.file else str(place)
    return f"{what} is neither a local path nor in the cache, and the Hub cannot be reached: {said}"


def kind_of(source: Source) -> str:
    """The kind of a folder or a file: "stable_diffusion", which is also what none of the others is, "ldm" or "pixels".

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(source, Weights) and Path(source).is_dir():
        return class_of_index(read_json(Path(source) / INDEX)).kind
    return kind_of_shapes(shapes_of(read_file(source).tensors))


def read_checkpoint(
    source: Source,
    *,
    dtype: Dtypes = "float32",
    family: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    place: Put | None = None,
    weights: str | None = None,
    optional: Collection[str] = (),
) -> Checkpoint:
    """Reads a folder, a file, or a file's content that was read already.

    Args:
        source: local; `resolve` finds others.
        dtype, place: as in `sdjax.checkpoints.checkpoint.Reading`.
        family, weights: of a file, as in `sdjax.checkpoints.layouts.original.read_single_file`.
        prediction: "epsilon", "v_prediction" or "sample", in place of what the checkpoint says.
        variant: of a folder's weights, e.g. "fp16"; None takes half-precision ones only where there are no others.
        tokenizer: the folder with BERT's vocab.txt, for a model of words that is stored without.
        optional: components that Stable Diffusion may lack, since a patch brings them, e.g. ("vae",).

    Raises:
        UserError: it is missing, corrupt or none of these; a choice is unknown, or is not for what it holds.
    """
    if isinstance(source, Weights) or not Path(source).is_dir():
        chosen = {"family": family, "prediction": prediction, "weights": weights}
        checkpoint = read_single_file(source, dtype, **chosen, place=place, optional=optional)
    else:
        if family is not None:
            raise UserError(f"family {family!r}: {source} is a folder, whose configs say what it is; leave it out")
        if weights is not None:
            raise UserError(f"weights {weights!r}: {source} is a folder, which holds no averages beside its weights")
        checkpoint = read_folder(source, dtype, variant=variant, place=place, optional=optional)
        if prediction is not None:
            if prediction not in PREDICTIONS:
                raise unknown("prediction", prediction, PREDICTIONS)
            scheduler = {**checkpoint.scheduler, "prediction_type": PREDICTIONS[prediction]}
            checkpoint = dataclasses.replace(checkpoint, scheduler=scheduler)
    return checkpoint if tokenizer is None else with_word_pieces(checkpoint, tokenizer)


def replace_vae(source: str | Path, place: Put | None = None) -> Patch:
    """Another autoencoder, in float32: of a file, or of a folder with its config.json, local or of the Hub.

    Its latents keep the scale that the model was trained with.

    Raises:
        UserError: by the patch, where the source cannot be read, its latents are others, or the model diffuses pixels.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.kind == PIXELS:
            raise UserError(f"vae {str(source)!r}: the model diffuses pixels, and has no autoencoder")
        own = checkpoint.components.get("vae")
        scale = own.config.scaling_factor if own else FAMILIES[family_of(checkpoint)].scaling_factor
        found, theirs = read_vae(resolve(source, component="vae"), place)
        if theirs is not None and checkpoint.kind == STABLE_DIFFUSION and not has_same_scale(theirs, scale):
            scales = f"its latents are scaled by {theirs:g}, the model's by {scale:g}"
            raise UserError(f"vae {str(source)!r} is of another family: {scales}")
        sizes = [(c.factor, c.latent_channels) for c in (found.config, own.config if own else found.config)]
        if sizes[0] != sizes[1]:
            said = [f"{channels} channels at 1/{factor} of a side" for factor, channels in sizes]
            raise UserError(f"vae {str(source)!r} has latents of {said[0]}, the model's own of {said[1]}")
        config = dataclasses.replace(found.config, scaling_factor=scale)
        return checkpoint.replace_component("vae", dataclasses.replace(found, config=config))

    return patch


def read_vae(path: Path, place: Put | None = None) -> tuple[Component, float | None]:
    """An autoencoder alone, or that of a whole checkpoint; and the scale of its latents, which a file alone lacks.

    Raises:
        UserError: it cannot be read.
    """
    if path.is_dir():
        parts = (path / name for name in ("vae", FIRST_STAGE))
        found = read_component(next((part for part in parts if (part / CONFIG).is_file()), path), "vae", place=place)
        return found, found.config.scaling_factor
    stored = read_file(path)
    if has_diffusers_names(stored.tensors) and path.with_name(CONFIG).is_file():
        found = read_component(path, "vae", place=place)
        return found, found.config.scaling_factor
    is_whole = any(key.startswith(UNET) for key in stored.tensors)
    family = detect(stored).family if is_whole else None
    found = read_autoencoder_file(stored, family=family or "sd1", place=place)
    return found, found.config.scaling_factor if is_whole else None
