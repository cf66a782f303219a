"""Compiled programs that outlive a process, in a folder that nobody else may write: they are run as they are read."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"

logger = logging.getLogger("sdjax")


def keep_compiled(folder: Path | None = None) -> Path | None:
    """Turns on JAX's persistent compilation cache. Where the user chose a folder, JAX's own variable, that one is kept.

    Args:
        folder: None for sdjax/compiled in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); it is made.

    Returns:
        The folder, or None if there is none that only this user may write; the log says why.
    """
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdjax" / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        logger.warning("compiled programs are not kept: %s: %s", folder, error.strerror)
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        logger.warning("compiled programs are not kept: %s is not a folder that you alone may write", folder)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
