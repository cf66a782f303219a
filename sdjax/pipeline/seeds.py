"""Seeds that a call leaves to chance."""

from __future__ import annotations

import logging
import secrets

from sdjax.parallel.distributed import agreed

RANDOM = -1  # as in A1111

logger = logging.getLogger("sdjax")


def drawn_seed(seed: int) -> int:
    """The seed; in place of `RANDOM` one of 32 bits, the same in all processes, which the log says."""
    if seed != RANDOM:
        return seed
    seed = int(agreed(str(secrets.randbelow(2**32))))
    logger.info("seed %d, drawn at random", seed)
    return seed
