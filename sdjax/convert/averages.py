"""The average of a UNet's weights over training, which original files hold beside the weights themselves.

CompVis/latent-diffusion, ldm/modules/ema.py: each is named as the parameter that it averages, without its dots.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdjax.convert.families import UNET
from sdjax.convert.files import Writable
from sdjax.core.errors import UserError, unknown

PREFIX = "model_ema."
CHOICES = ("ema", "model")


def chosen_weights(tensors: Mapping[str, Writable], weights: str | None, path: object) -> dict[str, Writable]:
    """The tensors of a file, its UNet's averaged or not, and no averages beside them.

    Args:
        weights: "ema", "model", or None for averages where the file has them.

    Raises:
        UserError: there is no such choice, or the file lacks the averages.
    """
    if weights not in (None, *CHOICES):
        raise unknown("weights", weights, CHOICES)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    if weights == "model":
        return kept
    names = {key: PREFIX + key.removeprefix("model.").replace(".", "") for key in kept if key.startswith(UNET)}
    absent = [name for name in names.values() if name not in tensors]
    if absent and (weights is not None or len(absent) < len(names)):
        raise UserError(f"{path} has averages of {len(names) - len(absent)} of the UNet's {len(names)} tensors")
    return kept if absent else kept | {key: tensors[name] for key, name in names.items()}
