"""The Inception Score (Salimans et al. 2016), as torch-fidelity computes it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

from sdjax.core.errors import UserError


class Score(NamedTuple):
    """Mean and deviation over splits."""

    mean: float
    std: float


def inception_score(logits: Float[np.ndarray, "n c"], *, splits: int = 10, seed: int | None = 2020) -> Score:
    """exp of the mean KL between what each image is taken for and what all of its split are.

    Args:
        logits: of Inception, without the classifier's bias.
        splits: the images are divided into so many parts; ADM takes parts of 5000.
        seed: of the shuffle before; None leaves the order.

    Raises:
        UserError: there are more splits than images.
    """
    if len(logits) < splits:
        raise UserError(f"the Inception Score takes {splits} splits, and there are {len(logits)} images")
    order = np.arange(len(logits)) if seed is None else np.random.RandomState(seed).permutation(len(logits))
    logs = log_softmax(np.asarray(logits, np.float64)[order], axis=1)
    found = []
    for i in range(splits):
        part = logs[i * len(logs) // splits : (i + 1) * len(logs) // splits]
        all_of_them = np.log(np.exp(part).mean(0))
        found.append(np.exp((np.exp(part) * (part - all_of_them)).sum(1).mean()))
    return Score(float(np.mean(found)), float(np.std(found)))
