"""Checkpoints: one Orbax composite of state, data position and metadata. Restore or fail; never start afresh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sdjax.core.errors import UserError
from sdjax.training.step import TrainState

OWNER = "config.json"
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a workdir, written in the background, the newest `keep` of them retained."""

    def __init__(self, workdir: Path, keep: int):
        """Opens workdir/checkpoints, making it if need be."""
        self._folder = workdir / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: bytes) -> None:
        """Begins to write the state and the data iterator's position; returns before the disk is done."""
        step = int(state.step)
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=ocp.args.JsonSave(json.loads(position)),
                versions=ocp.args.JsonSave({"jax": jax.__version__, "orbax": ocp.__version__}),
            ),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, bytes]:
        """The newest checkpoint, in the shapes and shardings of `like`.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        step = self.latest
        assert step is not None, "nothing to restore"
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # whatever the reader stumbled on, the run must not go on
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot restore {self._folder / str(step)}: {reason}") from error
        return TrainState(**restored["state"]), json.dumps(restored["data"]).encode()

    def __enter__(self) -> Checkpoints:
        """For `with`."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def check_owner(workdir: Path, config: dict[str, Any], free: tuple[str, ...]) -> None:
    """Checks that a workdir is new, or this config's own.

    Args:
        workdir: the folder; config.json in it says whose it is.
        config: plain data.
        free: dotted keys that may change between runs, such as "train.steps"; a section's name frees all of it.

    Raises:
        UserError: the folder belongs to another config; the message names the first key that differs.
    """
    path = workdir / OWNER
    if not path.exists():
        if any(entry.name.isdigit() for entry in (workdir / FOLDER).glob("*")):
            raise UserError(f"{workdir} has checkpoints but no {OWNER} that says whose they are")
        return
    try:
        owner = _dotted(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    mine = _dotted(json.loads(json.dumps(config)))
    for key in sorted(owner.keys() | mine.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in free)
        if not allowed and owner.get(key) != mine.get(key):
            raise UserError(
                f"{workdir} belongs to another config: {key} is {owner.get(key)!r} there and {mine.get(key)!r} here; "
                "choose another --workdir"
            )


def claim(workdir: Path, config: dict[str, Any]) -> None:
    """Makes a new workdir this config's own."""
    path = workdir / OWNER
    if not path.exists():
        path.write_text(json.dumps(config, indent=2) + "\n")


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_dotted(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
