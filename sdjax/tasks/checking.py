"""Data of a run, checked before it."""

from __future__ import annotations

from sdjax.core.config import Config
from sdjax.data.sources import validate
from sdjax.tasks.base import row_rules
from sdjax.tasks.finetune import from_checkpoint, is_finetuning


def check_data(config: Config) -> int:
    """Read all that a run would read, print its bad rows, and return how many they are.

    Without precomputed latents it is the source that they would be computed from.

    Raises:
        UserError: as `sources.source`, or as `PreparedSource`; or the checkpoint that a run begins from cannot be read.
    """
    if prepared := config.data.get("prepared", ""):
        return validate.report_prepared(prepared)
    config = from_checkpoint(config) if is_finetuning(config) else config
    return validate.report(config.data.source, rules=row_rules(config))
