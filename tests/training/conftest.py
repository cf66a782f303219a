from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from configs import openmoji


@pytest.fixture(scope="session")
def make_config(pictures):
    """make_config(variant, steps): a tiny config over the sixteen images whose rate does not depend on `steps`."""

    def make(variant: str, steps: int = 4) -> ConfigDict:
        config = openmoji.get_config(variant)
        config.data.source = f"folder:{pictures}"
        config.optim.schedule = "constant"
        config.optim.name = "adamw"
        config.train.steps = steps
        return config

    return make
