"""A local folder or file of any kind that is here, opened once: what it is, and the checkpoint that it holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sdjax.convert.adm_file import is_adm_file, read_adm_file
from sdjax.convert.components import Checkpoint, Dtypes
from sdjax.convert.families import PREDICTIONS
from sdjax.convert.files import read_json
from sdjax.convert.folder import read_folder
from sdjax.convert.ldm_file import holds_ldm, read_ldm_file
from sdjax.convert.model_index import INDEX, LDM, PIXELS, STABLE_DIFFUSION, kind_of_index
from sdjax.convert.rules import Placer
from sdjax.convert.single_file import read_single_file
from sdjax.convert.tokenizers import with_word_pieces
from sdjax.convert.weights import Source, Weights, read_file
from sdjax.core.errors import UserError, unknown


def kind_of(source: Source) -> str:
    """What a folder or a file holds: "stable_diffusion", which is also what none of the others is, "ldm" or "pixels".

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(source, Weights) and Path(source).is_dir():
        return kind_of_index(read_json(Path(source) / INDEX))
    stored = read_file(source)
    return LDM if holds_ldm(stored) else PIXELS if is_adm_file(stored) else STABLE_DIFFUSION


def read_checkpoint(
    source: Source,
    *,
    dtype: Dtypes = "float32",
    family: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    place: Placer | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """Reads a folder, a file, or a file's content that was read already.

    Args:
        source: local; `sdjax.convert.hub.resolve` finds others.
        dtype: of the parameters: a name, None for the type that each is stored in, or either for each network; None,
            too, for networks that such a mapping lacks.
        family: what a file is, where its keys and shapes mislead.
        prediction: "epsilon", "v_prediction" or "sample", in place of what the checkpoint says.
        variant: of a folder's weights, e.g. "fp16"; None takes half-precision ones only where there are no others.
        tokenizer: the folder with BERT's vocab.txt, for a model of words that is stored without.
        place: called with each array (NumPy) as soon as it is converted and with its path, e.g. "unet/conv_in/kernel";
            what it returns, e.g. the array on devices, takes its place in the tree.
        weights: of a file: "ema", "model", or None for averages where a file of the LDM paper's has them.

    Raises:
        UserError: it is missing, corrupt or none of these; a choice is unknown, or is not for what it holds.
    """
    if not isinstance(source, Weights) and Path(source).is_dir():
        if family is not None:
            raise UserError(f"family {family!r}: {source} is a folder, whose configs say what it is; leave it out")
        if weights is not None:
            raise UserError(f"weights {weights!r}: {source} is a folder, which holds no averages beside its weights")
        checkpoint = read_folder(source, dtype, variant=variant, place=place)
    elif (kind := kind_of(stored := read_file(source))) == LDM:
        checkpoint = read_ldm_file(stored, dtype, family=family, weights=weights, place=place)
    elif kind == PIXELS:
        if weights is not None:
            raise UserError(f"weights {weights!r}: {stored.path} holds no averages beside its weights")
        checkpoint = read_adm_file(stored, dtype, family=family, place=place)
    else:
        chosen = {"family": family, "prediction": prediction, "weights": weights or "model"}
        checkpoint = read_single_file(stored, dtype, place=place, **chosen)
    if prediction is not None:
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        scheduler = {**checkpoint.scheduler, "prediction_type": PREDICTIONS[prediction]}
        checkpoint = dataclasses.replace(checkpoint, scheduler=scheduler)
    return checkpoint if tokenizer is None else with_word_pieces(checkpoint, tokenizer)
