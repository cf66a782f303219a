"""LPIPS and the patch discriminator beside PyTorch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_critics import TorchDiscriminator, TorchLPIPS, vgg16
from torch_reference import channels_first, channels_last, randomised, translated

from sdjax.checkpoints import metric_weights
from sdjax.checkpoints.mapping import read
from sdjax.checkpoints.networks import perceptual
from sdjax.checkpoints.storage.safetensors import read_safetensors
from sdjax.core.tree import flatten, size
from sdjax.models.lpips import LPIPS
from sdjax.models.patchgan import PatchDiscriminator

RNG = np.random.default_rng(0)
X, Y = (RNG.uniform(-1, 1, (2, 48, 32, 3)).astype("f") for _ in range(2))


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """PyTorch's with random weights, whose convolutions lie in a folder under their published name, and ours."""
    vgg = randomised(vgg16())
    folder = tmp_path_factory.mktemp("weights")
    state = {**vgg.state_dict(), "classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)}
    torch.save(state, folder / "vgg16-397923af.pth")
    linear = [torch.from_numpy(np.asarray(v)) for _, v in sorted(read_safetensors(metric_weights.LINEAR).items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDJAX_WEIGHTS", str(folder))
        return TorchLPIPS(vgg, linear), metric_weights.load("vgg16")


@jax.jit
def distances_and_gradient(params, y):
    """From X; the gradient of their sum."""

    def total(y):
        found = LPIPS().apply({"params": params}, X, y)
        return found.sum(), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(y)
    return found, gradient


def test_lpips_and_its_gradient_agree_with_pytorch(lpips):
    """Distances to 1e-5 of themselves, gradients to 1e-4 of their largest."""
    theirs, params = lpips
    y = channels_first(Y).requires_grad_()
    expected = theirs(channels_first(X), y)
    expected.sum().backward()

    found, gradient = distances_and_gradient(params, Y)
    np.testing.assert_allclose(found, expected.detach().flatten(), rtol=1e-5)
    scale = float(y.grad.abs().max())
    np.testing.assert_allclose(gradient, channels_last(y.grad), atol=1e-4 * scale, rtol=0)
    np.testing.assert_array_equal(distances_and_gradient(params, X)[0], 0.0)


def test_a_picture_without_activations_has_a_gradient(lpips):
    """PyTorch's square root gives NaN there."""
    dead = {**lpips[1], "net": jax.tree.map(jnp.zeros_like, lpips[1]["net"])}
    np.testing.assert_array_equal(distances_and_gradient(dead, Y)[1], 0.0)


def test_the_original_checkpoint_names_the_same_weights(lpips):
    """`loss.perceptual_loss.net.slice2.5.weight` of an LDM autoencoder is torchvision's `features.5.weight`."""
    theirs, params = lpips
    slices = (4, 9, 16, 23, 30)
    stored = {}
    for key, value in theirs.net.state_dict().items():
        number = int(key.split(".")[0])
        stored[f"perceptual_loss.net.slice{1 + sum(number >= end for end in slices)}.{key}"] = value.numpy()
    stored |= {f"perceptual_loss.lin{i}.model.1.weight": w.numpy() for i, w in enumerate(theirs.weights)}
    stored |= {"perceptual_loss.scaling_layer.shift": np.zeros((1, 3, 1, 1))}
    found = flatten(read(perceptual.LPIPS_TABLE, stored, perceptual.lpips_shapes(), np.float32, ""))
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.mark.parametrize(("layers", "total"), [(3, 2_765_633), (2, 663_361)])
def test_the_discriminator_agrees_with_pytorch(layers, total):
    """Logits of a batch to 1e-5, gradients of every parameter to 1e-4 of their largest."""
    theirs = randomised(TorchDiscriminator(layers)).train()
    table, shapes = perceptual.discriminator_table(layers), perceptual.discriminator_shapes(layers)
    assert size(shapes) == total
    params = translated(theirs, table, shapes)
    expected = theirs(channels_first(X))
    weights = RNG.standard_normal(channels_last(expected).shape).astype("f")
    (expected * channels_first(weights)).sum().backward()
    model = PatchDiscriminator(layers)
    ours = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, X) * weights).sum()))
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, X), channels_last(expected), atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter, gradient in zip(theirs.parameters(), gradients.values(), strict=True):
        parameter.data = gradient
    found = flatten(ours(params))
    for name, leaf in flatten(translated(theirs, table, shapes)).items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-4 * np.abs(leaf).max(), err_msg=name)


def test_a_fresh_discriminator_is_drawn_as_the_original():
    params = flatten(jax.jit(PatchDiscriminator().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"])
    kernels = np.concatenate([leaf.ravel() for name, leaf in params.items() if name.endswith("kernel")])
    scales = np.concatenate([leaf.ravel() for name, leaf in params.items() if name.endswith("scale")])
    assert kernels.std() == pytest.approx(0.02, rel=0.01)
    assert (scales.mean(), scales.std()) == (pytest.approx(1.0, abs=0.005), pytest.approx(0.02, rel=0.15))


def test_missing_weights_name_their_address_and_a_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SDJAX_WEIGHTS", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert metric_weights.find("vgg16") is None
    said = metric_weights.missing("vgg16")
    place = f"download https://download.pytorch.org/models/vgg16-397923af.pth to {tmp_path}/mine/vgg16-397923af.pth "
    for part in (place, "torch/hub/checkpoints", "$SDJAX_WEIGHTS"):
        assert part in said
