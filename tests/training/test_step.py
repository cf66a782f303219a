"""The training step on a problem whose gradient can be written down: linear regression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from sdjax.core.errors import UserError
from sdjax.core.prng import stream
from sdjax.parallel.mesh import make_mesh
from sdjax.training.optim import make_optimizer
from sdjax.training.step import ema_decay, init_state, make_step
from sdjax.training.task import Task

WIDTH = 4


def regression() -> Task:
    """Least squares, with one frozen offset."""

    def init(key):
        return {"model": {"kernel": jax.random.normal(key, (WIDTH, 1))}}

    def loss(params, batch, key, step):
        del key
        prediction = batch["x"] @ params["model"]["kernel"] + params["offset"]["value"]
        return jnp.square(prediction - batch["y"]).mean(), {"mean": prediction.mean()}

    return Task(init, loss, None, None, None, None)  # pyright: ignore[reportArgumentType]


FROZEN = {"offset": {"value": jnp.ones(1)}}


def batches(count: int, size: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(size, WIDTH)).astype("f"), "y": rng.normal(size=(size, 1)).astype("f")}
        for _ in range(count)
    ]


@pytest.fixture
def optim():
    from configs.common import base

    return base().optim


def run(optimizer, steps: int = 5, **options):
    task = regression()
    state = init_state(task, optimizer, 0, make_mesh({"data": -1}))
    first = np.asarray(state.params["model"]["kernel"])
    step = make_step(task, optimizer, 0, decay=0.5, **options)
    for batch in batches(steps):
        state, metrics = step(state, FROZEN, batch)
    return first, state, metrics


def test_adamw_follows_torch(optim):
    """Warm-up, clipping, decoupled decay: torch.optim.AdamW to 1e-5 (torch adds 1e-6 to the norm it clips by)."""
    optim.update(learning_rate=0.1, warmup_steps=3, weight_decay=0.1, clip_norm=0.5)
    first, state, _ = run(make_optimizer(optim, 5))
    weight = torch.tensor(first, requires_grad=True)
    reference = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.1)
    for i, batch in enumerate(batches(5)):
        reference.param_groups[0]["lr"] = 0.1 * min(i / 3, 1.0)
        reference.zero_grad()
        ((torch.tensor(batch["x"]) @ weight + 1.0 - torch.tensor(batch["y"])) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        reference.step()
    np.testing.assert_allclose(state.params["model"]["kernel"], weight.detach().numpy(), atol=1e-5)


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """Plain SGD, so that a gradient of another size would show; to 1e-6."""
    _, whole, metrics = run(optax.sgd(0.1))
    _, parts, same = run(optax.sgd(0.1), accumulate=4)
    np.testing.assert_allclose(parts.params["model"]["kernel"], whole.params["model"]["kernel"], atol=1e-6)
    for name in ("loss", "mean", "grad_norm"):
        assert float(same[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


def test_ema_is_the_average_written_out():
    task, optimizer = regression(), optax.sgd(0.1)
    state = init_state(task, optimizer, 0, make_mesh({"data": -1}))
    average = np.asarray(state.params["model"]["kernel"])
    step = make_step(task, optimizer, 0, decay=0.3)
    for n, batch in enumerate(batches(6)):
        state, _ = step(state, FROZEN, batch)
        kept = min(0.3, (1 + n) / (10 + n))
        average = kept * average + (1 - kept) * np.asarray(state.params["model"]["kernel"])
    np.testing.assert_allclose(state.ema["model"]["kernel"], average, atol=1e-6)
    assert float(ema_decay(jnp.array(100_000), 0.9999)) == pytest.approx(0.9999)


def test_muon_steps_are_orthogonal(optim):
    """The first update of a wide matrix has singular values near one (Jordan et al. 2024: within [0.68, 1.13])."""
    optim.update(name="muon", warmup_steps=0, learning_rate=1.0, weight_decay=0.0)
    optimizer = make_optimizer(optim, 10)
    params = {"kernel": jnp.zeros((3, 3, 4, 16)), "bias": jnp.zeros(16)}
    grads = jax.tree.map(lambda leaf: jax.random.normal(stream(0, "g"), leaf.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    update = np.asarray(updates["kernel"]).reshape(-1, 16)
    singular = np.linalg.svd(update / np.abs(update).max(), compute_uv=False)
    assert singular.max() / singular.min() < 2.0
    assert np.linalg.cond(np.asarray(grads["kernel"]).reshape(-1, 16)) > 2.0


@pytest.mark.parametrize(("key", "value"), [("name", "lion"), ("schedule", "linear")])
def test_unknown_names_list_the_choices(optim, key, value):
    optim[key] = value
    with pytest.raises(UserError, match=rf"'{value}' in config.optim.{key}; choose one of"):
        make_optimizer(optim, 10)


def test_one_compilation_for_all_steps():
    task, optimizer = regression(), optax.sgd(0.1)
    state = init_state(task, optimizer, 0, make_mesh({"data": -1}))
    step = make_step(task, optimizer, 0, decay=0.5)
    for batch in batches(4):
        state, _ = step(state, FROZEN, batch)
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
