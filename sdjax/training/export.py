"""Export of a finished run, for others to load: whole or not at all, written by the first process."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sdjax.core.config import EXPORT
from sdjax.core.tree import Params
from sdjax.parallel.distributed import is_first, sync
from sdjax.training.workdir import copy_tree, is_remote, unwritable, write_whole

RECORD = "export.json"
SMALL = 2**16  # bytes; less is not worth a file


def exported_step(workdir: epath.Path) -> int:
    """The step whose export is there, all of it; 0 where there is none."""
    try:
        found = json.loads((workdir / RECORD).read_text())
    except (FileNotFoundError, ValueError):  # none, or one that a power loss cut: the export is made again
        return 0
    is_whole = isinstance(found, dict) and isinstance(found.get("step"), int) and (workdir / EXPORT).exists()
    return found["step"] if is_whole else 0


def exported(workdir: epath.Path, step: int) -> bool:
    """True if the export of `step` is there, all of it."""
    return exported_step(workdir) == step


def write_export(
    write: Callable[[Params, Path], None], params: Params, workdir: epath.Path, step: int, mesh: Mesh
) -> None:
    """Calls a task's `export`, into a folder that takes its name only when it is complete.

    Args:
        write: (parameters, local folder) -> None.
        params: of all processes, wherever their parts are. They are gathered one array at a time into files of the
            first process: beside the run itself, no process holds more than one array.
        workdir: export/ is written there, then export.json, which says of which step it is.
        step: of the parameters.
        mesh: of the run.

    Raises:
        UserError: it cannot be written.
    """
    record, folder = workdir / RECORD, workdir / EXPORT
    with unwritable(workdir, step), _scratch(workdir) as scratch:
        whole = gathered(params, scratch) if jax.process_count() > 1 else params
        if is_first():
            with _alone(mesh):
                write(whole, scratch / EXPORT)
            record.unlink(missing_ok=True)
            if folder.exists():
                folder.rmtree()
            if is_remote(workdir):
                copy_tree(epath.Path(scratch / EXPORT), folder)
            else:
                (scratch / EXPORT).rename(folder)
            write_whole(record, (json.dumps({"step": step}) + "\n").encode())
    sync("export")


def local_folder(folder: str) -> str:
    """The same, or where a local copy of a folder in a bucket now is: weights are read with ordinary system calls.

    Of a finished run's workdir the export is copied.
    """
    path = epath.Path(folder)
    if not is_remote(path):
        return folder
    path = path / EXPORT if (path / EXPORT).exists() else path
    copy = epath.Path(tempfile.mkdtemp(prefix="sdjax-"))
    copy_tree(path, copy)
    return str(copy)


def gathered(params: Params, scratch: Path) -> Params:
    """Arrays of all processes as NumPy arrays: the first process keeps them in files, the others drop them.

    Every process must call this, with the same tree.
    """
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [_gather(leaf, scratch / str(i)) for i, leaf in enumerate(leaves)])


def _gather(leaf: Any, file: Path) -> np.ndarray | None:
    array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    if not is_first():
        return None
    if array.nbytes < SMALL:
        return array
    stored = np.memmap(file, array.dtype, "w+", shape=array.shape)
    stored[...] = array
    stored.flush()
    return np.memmap(file, array.dtype, "r", shape=array.shape)


@contextlib.contextmanager
def _scratch(workdir: epath.Path) -> Iterator[Path]:
    """A local folder for the time being, on the disk of the workdir where that is local: /tmp may be memory."""
    if is_remote(workdir) or not is_first():
        with tempfile.TemporaryDirectory(prefix="sdjax-") as folder:
            yield Path(folder)
        return
    folder = Path(workdir / f"{EXPORT}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def _alone(mesh: Mesh) -> Iterator[None]:
    """Makes a mesh of one device of this process the one in use: the others do not take part in what is computed."""
    if jax.process_count() == 1:
        yield
        return
    devices = np.array(jax.local_devices()[:1]).reshape((1,) * len(mesh.axis_names))
    with jax.set_mesh(Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)):
        yield
