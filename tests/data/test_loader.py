"""The order of the data: each example once an epoch, the same after a restore, split without loss or overlap."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.loader import Prefetch, Shard, loader
from sdjax.data.sources.open import ArraySource
from sdjax.data.transforms.images import Flip, square

SHIPPED = Path(__file__).parents[2] / "checkpoints/openmoji/tokenizer"
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
SOURCE = ArraySource({"id": np.arange(12), "image": IMAGES})


def ids(batches, count):
    return np.stack([batch["id"] for batch in itertools.islice(batches, count)])


def test_each_example_once_an_epoch_in_a_new_order():
    epochs = ids(loader(SOURCE, 4, seed=0), 9).reshape(3, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(12))}) == 4


def test_odd_batch_loses_nothing():
    epochs = ids(loader(SOURCE, 5, seed=0), 12).reshape(5, 12)
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 5


def test_seed_is_the_order():
    first, same, other = (ids(loader(SOURCE, 4, seed=seed), 3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def flipped(count=6, **kwargs):
    return loader(SOURCE, 4, 3, [Flip()], **kwargs)


@pytest.mark.parametrize("step", [0, 2, 5, 100])
def test_restored_position_continues_the_same_pictures(step):
    data = flipped()
    for _ in range(step):
        next(data)
    state = data.get_state()
    expected = [next(data) for _ in range(4)]
    again = flipped()
    next(again)
    again.set_state(state)
    assert again.step == step
    for batch in expected:
        np.testing.assert_equal(next(again), batch)
    assert again.step == step + 4


def test_state_of_other_data_is_refused():
    state = loader(SOURCE, 4, seed=3).get_state()
    for other in (
        loader(SOURCE, 6, seed=3),
        loader(SOURCE, 4, seed=4),
        loader(ArraySource({"id": np.arange(9)}), 4, 3),
    ):
        with pytest.raises(UserError, match="saved data position is for"):
            other.set_state(state)
        assert other.step == 0


def test_processes_partition_each_batch_of_one_process():
    whole = flipped()
    parts = [flipped(shard=Shard(index, 2)) for index in range(2)]
    for _ in range(7):
        both = [next(part) for part in parts]
        joined = {name: np.concatenate([part[name] for part in both]) for name in both[0]}
        np.testing.assert_equal(joined, next(whole))
    whole.set_state(parts[1].get_state())  # another number of processes continues the run
    np.testing.assert_equal(next(whole)["id"][2:], next(parts[1])["id"])


def test_threads_do_not_change_the_order():
    plain = ids(flipped(reading=Prefetch(threads=0, ahead=0)), 20)
    np.testing.assert_array_equal(ids(flipped(reading=Prefetch(threads=4, ahead=8)), 20), plain)


def test_flips_about_half_and_only_mirrors():
    data, mirrored = loader(SOURCE, 12, 0, [Flip()]), 0
    for _ in range(20):
        batch = next(data)
        for key, image in zip(batch["id"], batch["image"], strict=True):
            is_mirror = (image == IMAGES[key][:, ::-1]).all()
            assert is_mirror or (image == IMAGES[key]).all()
            mirrored += is_mirror
    assert 80 < mirrored < 160  # 240 coins: 120, standard deviation 8


def test_square_takes_the_middle_and_keeps_flat_colours():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (200, 100, 50)
    np.testing.assert_array_equal(square(image, 10), np.full((10, 10, 3), (200, 100, 50), np.uint8))
    np.testing.assert_array_equal(square(IMAGES[0], 4), IMAGES[0])


def test_error_in_a_picture_reaches_the_user_as_it_is():
    class Broken(grain.transforms.Map):
        def map(self, element):
            raise UserError("cannot read image x.png")

    with pytest.raises(UserError, match=r"x\.png"):
        next(loader(SOURCE, 4, 0, [Broken()]))


class Dying:
    """An iterator over batches, one of whose workers is killed before the next."""

    def __next__(self):
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs above")

    def close(self):
        pass


def test_a_killed_worker_changes_no_batch(caplog):
    data, plain = flipped(), flipped()
    for _ in range(3):
        np.testing.assert_equal(next(data), next(plain))
        data._iterator = Dying()
        np.testing.assert_equal(next(data), next(plain))
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == "batch 2: a worker that reads data ended with exit code -9; its work is done again"


def test_workers_that_die_again_end_the_run(monkeypatch):
    data = flipped()
    monkeypatch.setattr(data, "_start", lambda step: None)
    data._iterator = Dying()
    with pytest.raises(UserError, match=r"batch 1: .* exit code -9, as one did before; .* fewer config.data.workers"):
        next(data)


def test_too_little_memory_is_one_line():
    class Large(grain.transforms.Map):
        def map(self, element):
            raise MemoryError

    with pytest.raises(UserError, match=r"batch 1: not enough memory to read data; choose fewer config.data.workers"):
        next(loader(SOURCE, 4, 0, [Large()]))


WORKERS = """
import json, multiprocessing, sys, time
import numpy as np
from sdjax.data.loader import Prefetch, loader
from sdjax.data.sources.open import ArraySource
if __name__ == "__main__":
    source = ArraySource({"id": np.arange(12)})
    data, plain = loader(source, 4, 3, reading=Prefetch(1, 2, 2)), loader(source, 4, 3)
    for count in range(20):
        assert next(data)["id"].tolist() == next(plain)["id"].tolist()
        if count == 4:
            multiprocessing.active_children()[0].kill()
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    """And one that is killed before is replaced, while the batches stay what they are without workers."""
    (tmp_path / "parent.py").write_text(WORKERS)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        assert line, parent.communicate()[1]
        workers = json.loads(line)
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30.0
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match=r"config\.train\.batch_size=5 cannot be divided between 2 processes"):
        loader(SOURCE, 5, 0, shard=Shard(0, 2))
    with pytest.raises(UserError, match=r"config\.train\.batch_size=13 is more than the 12 examples"):
        loader(SOURCE, 13, 0)
