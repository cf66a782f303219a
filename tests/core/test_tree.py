"""Parts of parameter trees by name."""

from __future__ import annotations

import pytest

from sdjax.core.tree import flatten, merge
from sdjax.training.task import select

TREE = {
    "unet": {"mid": {"attn1": {"to_k": {"kernel": 1}}, "conv": {"kernel": 2, "bias": 3}}, "conv_out": {"bias": 4}},
    "unet_2": {"conv_out": {"bias": 5}},
    "vae": {"decoder": {"conv_out": {"bias": 6}}},
}


@pytest.mark.parametrize(
    ("patterns", "values"),
    [
        (("unet",), {1, 2, 3, 4}),
        (("unet/mid/attn1",), {1}),
        (("unet/*attn*",), {1}),
        (("*/bias",), {3, 4, 5, 6}),
        (("vae", "*/to_k/*"), {1, 6}),
        (("un",), set()),
        (("[u]net",), {1, 2, 3, 4}),
        ((), set()),
        (("*",), {1, 2, 3, 4, 5, 6}),
    ],
)
def test_a_tree_is_split_by_names_and_joined_again(patterns, values):
    named, others = select(TREE, patterns)
    assert set(flatten(named).values()) == values
    assert not set(flatten(named)) & set(flatten(others))
    assert merge(named, others) == merge(others, named) == TREE
    assert all(part for part in (*named.values(), *others.values()))


def test_of_two_leaves_the_second_is_taken():
    assert merge(TREE, {"vae": {"decoder": {"conv_out": {"bias": 7}}}})["vae"] == {"decoder": {"conv_out": {"bias": 7}}}
    assert TREE["vae"]["decoder"]["conv_out"]["bias"] == 6
