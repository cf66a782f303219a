"""A sampler's programs: what they compute grows as it must, and every part of the model is in memory all along."""

from __future__ import annotations

import jax
import pytest
from tiny_models import tiny_model

from sdjax.core.errors import UserError
from sdjax.core.tree import nbytes
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.trees import device_bytes
from sdjax.plan.programs import count_flops
from sdjax.plan.sampling import Wanted, sampler_rows, sampling_programs
from sdjax.plan.variants import VARIANTS, shaped

SIZES = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684, "sdxl_refiner": 2_259_526_660}


def flops(wanted: Wanted) -> dict[str, int]:
    programs = sampling_programs(tiny_model(), wanted, make_mesh({"data": -1}))
    return {program.name: count_flops(program)[0] for program in programs}


def test_flops_grow_with_network_calls_and_pictures():
    few, many = flops(Wanted(16, 1, 2)), flops(Wanted(16, 1, 6))
    assert few["text encoders"] == many["text encoders"]
    assert few["decoder"] == many["decoder"]
    assert 3 * few["scan of 2 network calls"] == many["scan of 6 network calls"]
    more = flops(Wanted(16, 4, 2))
    assert more["scan of 2 network calls"] == 4 * few["scan of 2 network calls"]


def test_padded_rows_of_a_table_are_left_out():
    model = tiny_model()
    assert sampler_rows(model, Wanted(16, 1, 7)).sigma.shape == (7,)
    heun = sampler_rows(model, Wanted(16, 1, 7, "heun"))
    assert heun.active.shape == (13,)
    assert heun.active.all()
    assert heun.limits.shape == (3,)


def test_every_part_of_the_model_is_in_memory_all_along():
    model = tiny_model()
    programs = sampling_programs(model, Wanted(16, 1, 2), make_mesh({"data": -1}))
    whole = nbytes(model.params)
    for program in programs:
        assert device_bytes(program.args[0]) + device_bytes(program.beside) == whole


def test_large_pictures_are_decoded_in_tiles():
    *_, decoder = sampling_programs(tiny_model(), Wanted(4096, 1, 2), make_mesh({"data": -1}))
    assert decoder.args[1].shape[1] * 2 == 1536
    assert decoder.turns == 16


@pytest.mark.parametrize("name", ["sdxl", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "sdxl")])
def test_models_by_name_have_the_published_sizes(name: str):
    model = shaped(name, "bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params["unet"])) == SIZES[name]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params["unet"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params["vae"])} == {"float32"}


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match="--size 15: choose a multiple of 2"):
        sampling_programs(tiny_model(), Wanted(15, 1, 2), make_mesh({"data": -1}))
