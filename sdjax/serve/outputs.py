"""Images of a server that are kept."""

from __future__ import annotations

import logging
from pathlib import Path

from sdjax.cli.records import write_image
from sdjax.core.errors import UserError
from sdjax.serve.jobs import Job

logger = logging.getLogger("sdjax")


def keep(job: Job, folder: Path) -> None:
    """Write a job's images with their settings; the log says what cannot be written, which no client can mend."""
    for number, result in enumerate(job.results):
        if result is not None:
            try:
                write_image(folder / f"{int(job.created)}-{job.id}-{number:02d}.png", result.pixels, result.record)
            except UserError as error:
                logger.error("%s", error)
