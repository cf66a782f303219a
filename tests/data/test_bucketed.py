"""Batches of one bucket each: an order that loses and repeats nothing, the same for any number of processes."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.bucketed import Order, bucketed
from sdjax.data.loader import Prefetch, Shard
from sdjax.data.sources.open import ArraySource
from sdjax.data.transforms.images import Flip

COUNTS = {0: 13, 3: 4, 7: 26}
BUCKETS = np.random.default_rng(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values())))
IMAGES = np.random.default_rng(1).integers(0, 256, (43, 2, 2, 3), np.uint8)
SOURCE = ArraySource({"id": np.arange(43), "bucket": BUCKETS, "image": IMAGES})


def batches(count, batch_size=4, seed=0, **how):
    return list(itertools.islice(bucketed(SOURCE, BUCKETS, batch_size, seed, **how), count))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_every_n_rows_of_a_bucket_are_all_of_it_once(batch_size):
    found = batches(5 * 43 // batch_size, batch_size)
    assert all(len(set(batch["bucket"])) == 1 for batch in found)
    orders = set()
    for bucket, count in COUNTS.items():
        stream = [key for batch in found if batch["bucket"][0] == bucket for key in batch["id"].tolist()]
        epochs = [stream[start : start + count] for start in range(0, len(stream) - count + 1, count)]
        assert len(epochs) >= 4
        for epoch in epochs:
            assert sorted(epoch) == np.flatnonzero(bucket == BUCKETS).tolist()
        if count > 4:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        orders.add(tuple(batch["bucket"][0] for batch in found))
    assert list(orders.pop()) != sorted(batch["bucket"][0] for batch in found)


def test_epoch_remainders_of_buckets():
    order = Order(BUCKETS, 4, 0)
    taken, ends = Counter(), {}
    for index in range(500):
        taken[order.batch(index).bucket] += 4
        ends[index + 1] = dict(taken)
    for epoch in range(1, 40):
        steps = sum(epoch * count // 4 for count in COUNTS.values())
        for bucket, count in enumerate(COUNTS.values()):
            assert 0 <= epoch * count - ends[steps].get(bucket, 0) < 4


def test_order_depends_on_seed_and_epoch():
    first, same, other = ([b["id"].tolist() for b in batches(40, seed=seed)] for seed in (1, 1, 2))
    assert first == same
    assert first != other
    order = Order(np.repeat([0, 1], 40), 4, 0)  # 20 batches an epoch, without remainders
    epochs = [tuple(order.batch(20 * epoch + i).bucket for i in range(20)) for epoch in range(6)]
    assert len(set(epochs)) == 6
    assert all(sum(epoch) == 10 for epoch in epochs)


@pytest.mark.parametrize("step", [0, 3, 10_000])
@pytest.mark.parametrize("shards", [(1, 2), (2, 4), (4, 1)])
def test_resumed_with_another_number_of_processes(step, shards):
    before, after = shards
    whole = bucketed(SOURCE, BUCKETS, 4, 3, [Flip()])
    whole.set_state(b'{"step": %d, %s' % (step, whole.get_state().split(b", ", 1)[1]))
    state = whole.get_state()
    for count in (before, after):
        parts = [bucketed(SOURCE, BUCKETS, 4, 3, [Flip()], Shard(i, count)) for i in range(count)]
        whole.set_state(state)
        for part in parts:
            part.set_state(state)
        for _ in range(6):
            joined = [next(part) for part in parts]
            expected = next(whole)
            for name, rows in expected.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in joined]), rows)
        state = parts[-1].get_state()
    assert whole.step == step + 12


def test_threads_do_not_change_the_order():
    plain = [b["id"].tolist() for b in batches(60, reading=Prefetch(threads=0, ahead=0))]
    assert [b["id"].tolist() for b in batches(60, reading=Prefetch(threads=4, ahead=8))] == plain


def test_random_transforms_differ_between_epochs():
    found = batches(200, transforms=[Flip()])
    mirrored = {}
    for batch in found:
        for key, image in zip(batch["id"].tolist(), batch["image"], strict=True):
            mirrored.setdefault(key, set()).add(bool((image == IMAGES[key][:, ::-1]).all()))
    assert all(seen == {True, False} for seen in mirrored.values())


def test_rows_without_a_bucket_are_never_read():
    buckets = np.where(BUCKETS == 3, -1, BUCKETS)
    loader = bucketed(SOURCE, buckets, 13, 0)
    seen = {key for _ in range(30) for key in next(loader)["id"].tolist()}
    assert seen == set(np.flatnonzero(buckets >= 0).tolist())
    with pytest.raises(UserError, match="no row of the data set is in a bucket"):
        bucketed(SOURCE, np.full(43, -1), 4, 0)


def test_impossible_batches_and_other_data_are_refused():
    with pytest.raises(
        UserError, match=r"config\.train\.batch_size=14 is more than the rows of bucket 0 \(13\), 3 \(4\); choose"
    ):
        bucketed(SOURCE, BUCKETS, 14, 0)
    with pytest.raises(UserError, match=r"config\.train\.batch_size=3 cannot be divided between 2 processes"):
        bucketed(SOURCE, BUCKETS, 3, 0, shard=Shard(0, 2))
    other = BUCKETS.copy()
    other[[0, np.flatnonzero(BUCKETS[0] != BUCKETS)[0]]] = other[[np.flatnonzero(BUCKETS[0] != BUCKETS)[0], 0]]
    with pytest.raises(UserError, match="saved data position is for"):
        bucketed(SOURCE, other, 4, 0).set_state(bucketed(SOURCE, BUCKETS, 4, 0).get_state())


def test_order_can_be_sent_to_worker_processes():
    order = Order(BUCKETS, 4, 0)
    places = [order.row(place) for place in range(200)]
    sent = pickle.loads(pickle.dumps(order))
    assert [sent.row(place) for place in range(200)] == places


def test_ten_million_rows_far_into_a_run():
    order = Order(np.arange(10_000_000) % 40, 2048, 0)
    far = [order.row(10**12 + place) for place in range(4096)]
    assert len(set(far)) == 4096
    assert len({row % 40 for row in far[:2048]}) <= 2  # a batch of 2048 that begins anywhere touches two


def test_buckets_of_one_size_have_orders_of_their_own():
    order = Order(np.repeat([0, 1], 50), 10, 0)
    rows = [order.row(place) for place in range(100)]
    first, second = ([row % 50 for row in rows if row // 50 == bucket] for bucket in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.slow
def test_worker_processes_do_not_change_the_order():
    plain = [b["id"].tolist() for b in batches(20)]
    assert [b["id"].tolist() for b in batches(20, reading=Prefetch(workers=2))] == plain
