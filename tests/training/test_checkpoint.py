"""Only whole checkpoints are restored, only sound ones, and which are kept."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from launching import corrupt

from configs.common import base
from sdjax.core.errors import UserError
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.checkpoint_folder import COMPLETE
from sdjax.training.fingerprint import fingerprint
from sdjax.training.step import TrainState


def position_at(step: int) -> bytes:
    return b'{"step": %d, "seed": 0}' % step


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
            checkpoints.save(state_at(step), position_at(step), metrics)
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def restored(workdir, **options) -> int:
    """The step of what is restored, after it was compared with what was saved."""
    config = base()
    config.train.update(options)
    with Checkpoints(epath.Path(workdir), config) as checkpoints:
        assert checkpoints.latest
        state, position = checkpoints.restore(state_at(0))
    step = int(state.step)
    assert position == position_at(step)
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


def changes_of(path: Path) -> list[bytes]:
    """A file cut in its middle; and with another byte there, or in JSON another digit."""
    raw = path.read_bytes()
    if path.name in ("metadata", "metrics"):  # JSON: other numbers, and a key that is not there
        digits = [i for i, byte in enumerate(raw) if chr(byte).isdigit()]
        digits = digits[:: max(len(digits) // 3, 1)]
        other = [raw[:i] + (b"1" if raw[i : i + 1] == b"0" else b"0") + raw[i + 1 :] for i in digits]
        return [raw[: len(raw) // 2], raw.replace(b'"seal"', b'"sfal"'), *other]
    middle = len(raw) // 2
    return [raw[:middle], raw[:middle] + bytes([raw[middle] ^ 64]) + raw[middle + 1 :]]


def refusal(workdir) -> str:
    """The message; or "" where everything is restored as it was saved."""
    try:
        assert restored(workdir) == 2
    except UserError as error:
        return str(error)
    return ""


def test_no_file_of_a_checkpoint_can_change_what_is_restored(tmp_path):
    """Whatever is done to one of its files, a checkpoint is restored to the bit, with its position, or refused."""
    save(tmp_path / "good", 2)
    files = [path for path in (tmp_path / "good").rglob("*") if path.is_file() and path.name != COMPLETE]
    refused = set()
    for path in files:
        for changed in changes_of(path):
            if changed == path.read_bytes():
                continue
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            (tmp_path / "bad" / path.relative_to(tmp_path / "good")).write_bytes(changed)
            if message := refusal(tmp_path / "bad"):
                assert "checkpoints/2" in message
                assert "\n" not in message
                refused.add(path.relative_to(tmp_path / "good/checkpoints/2").parts[0])
            shutil.rmtree(tmp_path / "bad")
    assert refused == {"state", "data", "metadata"}


@pytest.mark.parametrize(("old", "new"), [(b'"step": 2', b'"step": 0'), (b'"seed": 0', b'"seed": 1')])
def test_another_data_position_is_refused(old, new, tmp_path):
    save(tmp_path, 2)
    path = tmp_path / "checkpoints/2/data/metadata"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UserError, match=r"checkpoints/2: its data position .* is not what was saved"):
        restored(tmp_path)


def test_the_position_is_that_of_the_step(tmp_path):
    """Whole notes of another step are refused."""
    save(tmp_path, 2, 4)
    for item in ("data", "metadata"):
        shutil.rmtree(tmp_path / "checkpoints/4" / item)
        shutil.copytree(tmp_path / "checkpoints/2" / item, tmp_path / "checkpoints/4" / item)
    with pytest.raises(UserError, match=r"checkpoints/4: its data position is of step 2; .*restore=previous"):
        restored(tmp_path)


def test_a_damaged_checkpoint_does_not_hide_the_others(tmp_path, caplog):
    """Of an older one the log says that it is damaged; of the newest a run says it, unless it may go back."""
    save(tmp_path, 2, 4, 6, keep_checkpoints=3)
    (tmp_path / "checkpoints/4/metadata/metadata").write_text('{"config": {"da')
    with caplog.at_level(logging.WARNING, "sdjax"):
        assert restored(tmp_path) == 6
    assert names(tmp_path) == {"2", "4.corrupt", "6"}
    assert len(caplog.messages) == 1
    assert re.search(r"4/metadata/metadata is damaged: .*; that checkpoint is now .*4\.corrupt", caplog.text)
    (tmp_path / "checkpoints/6/metadata/metadata").write_text("")
    with pytest.raises(UserError, match=r"checkpoints/6/metadata/metadata is damaged.*goes back to step 2"):
        restored(tmp_path)
    assert restored(tmp_path, restore="previous") == 2


def test_what_a_killed_run_was_writing_or_deleting_is_removed(tmp_path):
    """Also where an earlier version left it. What is newer than all whole checkpoints was copied, perhaps: it stays."""
    save(tmp_path, 4)
    folder = tmp_path / "checkpoints"
    for name in ("2", "2.partial", "3.partial1", "8", "9.partial", "2.orbax-checkpoint-tmp", "2.deleted", "2.mine"):
        (folder / name / "state").mkdir(parents=True)
    shutil.copytree(folder / "4", folder / "3.deleted")
    assert restored(tmp_path) == 4
    assert names(tmp_path) == {"4", "8.partial", "9.partial", "2.mine"}


def test_a_state_that_is_not_finite_is_not_kept(tmp_path):
    """Of its parameters, its average or its moments."""
    save(tmp_path, 2)
    state = state_at(4)
    state = state._replace(ema={**state.ema, "a": state.ema["a"].at[3, 3].set(jnp.inf)})
    message = r"ema/a is not finite after step 4, so it is not kept; the checkpoint of step 2 is intact"
    with Checkpoints(epath.Path(tmp_path), base()) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.save(state, position_at(4), {})
    assert restored(tmp_path) == 2


@pytest.mark.parametrize("best", ["", "loss"])
def test_checkpoints_of_version_0_1_are_restored(best, tmp_path):
    """They have no seal, and a file of metrics: a position of another step is refused, a cut file names itself."""
    shutil.unpack_archive(Path(__file__).with_name("checkpoints_0_1.zip"), tmp_path)
    (tmp_path / "checkpoints/1/metrics/metrics").write_text('{"loss')

    def read() -> tuple[dict, bytes]:
        config = base()
        config.train.keep_best = best
        zeros = {"a": jnp.zeros((4, 4))}
        with Checkpoints(epath.Path(tmp_path), config) as checkpoints:
            state, position = checkpoints.restore(
                TrainState(jnp.zeros((), jnp.int32), zeros, zeros, {"count": jnp.zeros((), jnp.int32)})
            )
        return state._asdict(), position

    state, position = read()
    expected = 2 * np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(state["params"]["a"], expected)
    np.testing.assert_array_equal(state["ema"]["a"], expected)
    assert (int(state["step"]), int(state["opt_state"]["count"])) == (2, 2)
    assert json.loads(position) == {"step": 2, "examples": 32, "batch_size": 8, "seed": 0}
    assert names(tmp_path) == {"1.corrupt", "2"}
    path = tmp_path / "checkpoints/2/data/metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 0'))
    with pytest.raises(UserError, match=r"checkpoints/2: its data position is of step 0; there is none before it"):
        read()


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
    one = fingerprint(state_at(3)).sums
    assert one == fingerprint(state_at(3)).sums
    assert one["step"] == 3
    params = state_at(3).params
    bits = jax.lax.bitcast_convert_type(params["a"], jnp.uint32).at[7, 7].add(1)
    changed = state_at(3)._replace(params={**params, "a": jax.lax.bitcast_convert_type(bits, jnp.float32)})
    other = fingerprint(changed).sums
    assert {name for name in one if one[name] != other[name]} == {"params/a"}
    assert (other["params/a"] - one["params/a"]) % 2**32 == 1
