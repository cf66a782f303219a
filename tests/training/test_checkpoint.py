"""Only whole checkpoints are restored, only sound ones, and which are kept."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from launching import corrupt

from configs.common import base
from sdjax.core.errors import UserError
from sdjax.training.checkpoint import Checkpoints, fingerprint
from sdjax.training.step import TrainState

POSITION = b'{"step": 1}'


def state_at(step: int) -> TrainState:
    params = {"a": jax.random.normal(jax.random.key(step), (48, 48)), "h": jnp.full(64, step, jnp.bfloat16)}
    return TrainState(jnp.asarray(step, jnp.int32), params, params, {"count": jnp.asarray(step)})


def save(workdir, *at: int, losses=(), **options) -> list[int]:
    """Saves states; the steps that are kept."""
    config = base()
    config.train.update(options)
    with Checkpoints(epath.Path(workdir), config) as checkpoints:
        for i, step in enumerate(at):
            metrics = {"loss": losses[i]} if losses else {"loss": 1.0}
            checkpoints.save(state_at(step), POSITION, metrics)
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def restored(workdir, **options) -> int:
    """The step of what is restored, after it was compared with what was saved."""
    config = base()
    config.train.update(options)
    with Checkpoints(epath.Path(workdir), config) as checkpoints:
        assert checkpoints.latest
        state, position = checkpoints.restore(state_at(0))
    assert position == POSITION
    step = int(state.step)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), state, state_at(step))
    return step


def names(workdir) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def test_a_cut_copy_is_put_aside_and_never_restored(tmp_path):
    """What a killed writer leaves (Orbax's temporary name), and a folder that has its name without being complete."""
    save(tmp_path, 2)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    shutil.copytree(folder / "2", folder / "6")
    (folder / "6" / "commit_success.txt").unlink()
    shutil.rmtree(folder / "6" / "state")
    assert restored(tmp_path) == 2
    assert "6.partial" in names(tmp_path)
    assert save(tmp_path, 4, 6) == [4, 6]
    assert restored(tmp_path) == 6


def test_corrupt_checkpoint_stops_the_run(tmp_path):
    save(tmp_path, 2, 4)
    corrupt(tmp_path / "checkpoints/4")
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints/4: .*restore=previous goes back to step 2") as error:
        restored(tmp_path)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == before
    assert restored(tmp_path, restore="previous") == 2
    assert names(tmp_path) == {"2", "4.corrupt"}
    assert save(tmp_path, 4) == [2, 4]
    assert restored(tmp_path, restore="previous") == 4


def test_there_may_be_none_before(tmp_path):
    save(tmp_path, 2)
    corrupt(tmp_path / "checkpoints/2")
    with pytest.raises(UserError, match=r"checkpoints/2: .*there is none before it"):
        restored(tmp_path, restore="previous")
    assert names(tmp_path) == {"2"}
    with pytest.raises(UserError, match=r"'newest' in config.train.restore; choose one of: latest, previous"):
        restored(tmp_path, restore="newest")


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = (5.0, 1.0, 4.0, 2.0, float("inf"), 3.0)
    assert save(tmp_path / "newest", 1, 2, 3, 4, 5, 6, losses=losses) == [5, 6]
    assert save(tmp_path / "best", 1, 2, 3, losses=losses[:3], keep_best="loss") == [2, 3]
    # The metrics of the run before count in the next one.
    assert save(tmp_path / "best", 4, 5, 6, losses=losses[3:], keep_best="loss") == [2, 4, 5, 6]
    assert save(tmp_path / "other", 1, 2, 3, losses=losses[:3], keep_best="loss", keep_checkpoints=1) == [2, 3]


def test_a_fingerprint_is_of_all_bits():
    one = fingerprint(state_at(3))
    assert one == fingerprint(state_at(3))
    assert one["step"] == 3
    params = state_at(3).params
    bits = jax.lax.bitcast_convert_type(params["a"], jnp.uint32).at[7, 7].add(1)
    changed = state_at(3)._replace(params={**params, "a": jax.lax.bitcast_convert_type(bits, jnp.float32)})
    other = fingerprint(changed)
    assert {name for name in one if one[name] != other[name]} == {"params/a"}
    assert (other["params/a"] - one["params/a"]) % 2**32 == 1
