"""Scheduler configs whose values are of other types and sizes than they should be: one line, at once."""

from __future__ import annotations

import contextlib
import time

import pytest
from hostile import OTHER_TYPES

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import options
from sdjax.diffusion.samplers.options import SamplerOptions, schedule_of

NAMES = [row.name for row in (*options._CLASSES.values(), options._UNCLIP) if row.name]
KEYS = {
    *(field for row in options._CLASSES.values() for field in row.fields),
    *options._ONLY,
    *("_class_name", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas"),
    "rescale_betas_zero_snr",
}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_values_of_other_types(key: str):
    for name in dict.fromkeys(NAMES):
        for value in OTHER_TYPES:
            config = {"_class_name": name, "num_train_timesteps": 100, key: value}
            start = time.monotonic()
            with contextlib.suppress(UserError):
                SamplerOptions.from_scheduler_config(config)
            with contextlib.suppress(UserError):
                schedule_of(config)
            assert time.monotonic() - start < 5
