"""Checkpoints: one Orbax composite of state, data position and metadata. Restore or fail; never start afresh."""

from __future__ import annotations

import functools
import json
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers as policies

from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.parallel.distributed import is_first, sync
from sdjax.parallel.trees import path_name
from sdjax.training.step import TrainState
from sdjax.training.workdir import CHECKPOINTS

LATEST, PREVIOUS = "latest", "previous"
COMPLETE = "commit_success.txt"  # the last thing that Orbax writes into a checkpoint

logger = logging.getLogger("sdjax")


class Checkpoints:
    """The checkpoints of a workdir, written in the background.

    Of those there are, the newest `train.keep_checkpoints` are retained; where `train.keep_best` names a metric, as
    many with its lowest means beside them.
    """

    def __init__(self, workdir: epath.Path, config: Config):
        """Opens workdir/checkpoints, making it if need be; what a killed writer left there is put aside.

        Raises:
            UserError: `config.train.restore` is unknown.
        """
        options = config.train
        if options.restore not in (LATEST, PREVIOUS):
            raise unknown("choice", options.restore, (LATEST, PREVIOUS), "config.train.restore")
        self._folder, self._restore = workdir / CHECKPOINTS, options.restore
        self._metadata = {"config": config.to_dict(), "jax": jax.__version__, "orbax": ocp.__version__}
        if is_first():
            _put_partial_aside(self._folder)
        sync("checkpoints")
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=_retention(options))

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: bytes, metrics: dict[str, float]) -> None:
        """Begins to write; returns before the disk is done.

        Args:
            state: of all processes.
            position: of the data iterator.
            metrics: their means since the checkpoint before; not finite ones are left out.
        """
        step = int(state.step)
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=ocp.args.JsonSave(json.loads(position)),
                metadata=ocp.args.JsonSave({**self._metadata, "sums": fingerprint(state)}),
            ),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, bytes]:
        """The newest checkpoint, in the shapes and shardings of `like`, which is donated.

        With `config.train.restore=previous` a newest one that cannot be read is renamed, and the one before it read.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        jax.tree.map(lambda array: array.delete(), like)
        try:
            return self._read(steps[0], shapes)
        except UserError as error:
            if len(steps) < 2:
                raise UserError(f"{error}; there is none before it") from error
            if self._restore == LATEST:
                hint = f"--config.train.restore={PREVIOUS} goes back to step {steps[1]}"
                raise UserError(f"{error}; {hint}") from error
            logger.warning("%s; going on from step %d", error, steps[1])
        if is_first():
            _put_aside(self._folder / str(steps[0]), "corrupt")
        sync("put aside")
        self._manager.reload()
        return self._read(steps[1], shapes)

    def _read(self, step: int, shapes: Any) -> tuple[TrainState, bytes]:
        """One checkpoint; where one process cannot read it, all say so."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore(), metadata=ocp.args.JsonRestore()
        )
        restored, reason, cause = None, "", None
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # whatever the reader stumbled on, the run must not go on
            reason, cause = str(error).splitlines()[0] if str(error) else type(error).__name__, error
        if _any_process(restored is None):
            raise UserError(f"cannot restore {self._folder / str(step)}: {reason or 'another process'}") from cause
        assert restored is not None
        state, sums = TrainState(**restored["state"]), restored["metadata"]["sums"]
        wrong = [name for name, value in fingerprint(state).items() if sums.get(name) != value]
        if wrong:
            raise UserError(f"cannot restore {self._folder / str(step)}: {wrong[0]} is not what was saved")
        return state, json.dumps(restored["data"]).encode()

    def __enter__(self) -> Checkpoints:
        """For `with`."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def fingerprint(state: TrainState) -> dict[str, int]:
    """The sum of the bits of every array, as numbers modulo 2^32, by path: the same on every mesh.

    The file format checks its indices and not its numbers: a changed byte would become a changed parameter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state._asdict())
    sharding = leaves[0][1].sharding
    everywhere = jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else sharding
    sums = np.asarray(_sums(everywhere)([leaf for _, leaf in leaves]))
    names = (path_name(path) for path, _ in leaves)
    return dict(zip(names, sums.tolist(), strict=True))


@functools.cache
def _sums(sharding: Any) -> Any:
    return jax.jit(lambda leaves: jnp.stack([_sum_of_bits(leaf) for leaf in leaves]), out_shardings=sharding)


def _sum_of_bits(array: Array) -> UInt32[Array, ""]:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.uint32).sum(dtype=jnp.uint32)
    bits = jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint32
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32).sum(dtype=jnp.uint32)


def _retention(options: Config) -> ocp.CheckpointManagerOptions:
    def mean(metrics: dict[str, float]) -> float:
        return metrics.get(options.keep_best, math.inf)

    keep: list[Any] = [policies.LatestN(options.keep_checkpoints)]
    if options.keep_best:
        best = policies.BestN(
            get_metric_fn=mean, reverse=True, n=options.keep_checkpoints, keep_checkpoints_without_metrics=False
        )
        keep.append(best)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep), best_fn=mean, create=True
    )


def _put_partial_aside(folder: epath.Path) -> None:
    """Orbax writes under another name and renames, or, in a bucket, looks for the same file; a copy may be cut, too."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    for path in steps:
        if not (path / COMPLETE).exists():
            _put_aside(path, "partial")


def _put_aside(path: epath.Path, why: str) -> None:
    names = (f"{path.name}.{why}{number or ''}" for number in range(1000))
    aside = next(path.parent / name for name in names if not (path.parent / name).exists())
    path.rename(aside)
    logger.warning("%s is %s; it is now %s", path, why, aside)


def _any_process(flag: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(flag)).any()) if jax.process_count() > 1 else flag
