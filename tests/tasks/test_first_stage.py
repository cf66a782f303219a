"""The objective of LDM's autoencoders beside PyTorch: every term, the adaptive weight, and both networks' gradients."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from children import OPTIMISED
from torch_critics import TorchDiscriminator, TorchLPIPS, vgg16
from torch_reference import channels_first, drawn, randomised, translated

from configs import autoencoders
from sdjax.checkpoints import metric_weights
from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.checkpoints.mapping import export
from sdjax.checkpoints.networks import autoencoder as conversion
from sdjax.checkpoints.networks import perceptual
from sdjax.checkpoints.storage.safetensors import read_safetensors
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.autoencoder import make
from sdjax.training.optim import make_optimizer

SIDE, BATCH = 48, 2  # VGG's last block sees a sixteenth of it, which may not be less than a kernel
CASES = {
    "kl, learned variance, vanilla": ("kl_f4_tiny", {"learn_logvar": True, "criterion": "vanilla"}),
    "vq": ("vq_f4_tiny", {}),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with VGG16's weights, drawn at random, under their published name."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(randomised(vgg16()).state_dict(), folder / "vgg16-397923af.pth")
    return folder


def config_of(name: str, pictures, **changes: object):
    config = autoencoders.get_config(name)
    config.data.source = f"folder:{pictures}"
    config.data.size = config.task.crop = SIDE
    config.task.learn_logvar = changes.pop("learn_logvar", False)
    config.task.discriminator.update(changes)
    return config


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=pytest.mark.slow if case[0].startswith("vq") else ()) for case in CASES.values()],
    ids=CASES,
)
def case(request, weights, pictures, tmp_path_factory):
    """A task, its parameters, its gradient, and PyTorch's modules with the same parameters."""
    name, changes = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDJAX_WEIGHTS", str(weights))
        task = make(config_of(name, pictures, start=3, **changes), make_mesh({"data": -1}))
        stored = task.pretrained(sharded_put(make_mesh({"data": -1})))
    params = drawn(jax.eval_shape(task.init, jax.random.key(0))) | stored
    if "logvar" in params:
        params["logvar"] = {"value": np.float32(-0.3)}
    folder = tmp_path_factory.mktemp("theirs")
    task.export(params, folder)
    kind = diffusers.VQModel if name.startswith("vq") else diffusers.AutoencoderKL
    vae = kind.from_pretrained(folder / "vae")
    critic = TorchDiscriminator(2).train()
    state = export(perceptual.discriminator_table(2), params["discriminator"], perceptual.discriminator_shapes(2), "")
    critic.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()}, strict=False)
    linear = [torch.from_numpy(np.asarray(v)) for _, v in sorted(read_safetensors(metric_weights.LINEAR).items())]
    vgg = vgg16()
    vgg.load_state_dict(torch.load(weights / "vgg16-397923af.pth", weights_only=True))
    config = read_component(folder / "vae", "vae").config

    def loss(learned, frozen, image, key, step):
        return task.loss(learned | frozen, {"image": image}, key, step)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=OPTIMISED)
    return gradient, params, changes, (vae, config, critic, TorchLPIPS(vgg, linear))


def reference(modules, changes, x: torch.Tensor, noise: torch.Tensor, logvar: torch.Tensor, started: bool):
    """ldm/modules/losses/contperceptual.py or vqperceptual.py, both optimisers' losses: (autoencoder, critic, log)."""
    vae, _, critic, lpips = modules
    is_kl = isinstance(vae, diffusers.AutoencoderKL)
    if is_kl:
        posterior = vae.encode(x).latent_dist
        made = vae.decode(posterior.mean + posterior.std * noise).sample
    else:
        z = vae.encode(x).latents
        rounded, regular, _ = vae.quantize(z)
        made = vae.decoder(vae.post_quant_conv(rounded))
    rec = (x - made).abs() + lpips(x, made)
    if is_kl:
        nll = (rec / logvar.exp() + logvar).sum() / len(x)
        regular = 1e-6 * posterior.kl().sum() / len(x)
    else:
        nll = rec.mean()
    doubt = -critic(made).mean()
    last = vae.decoder.conv_out.weight
    nll_grad, doubt_grad = (torch.autograd.grad(v, last, retain_graph=True)[0] for v in (nll, doubt))
    weight = 0.5 if is_kl else 0.75
    weight *= (nll_grad.norm() / (doubt_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
    real, fake = critic(x), critic(made.detach())
    if changes.get("criterion") == "vanilla":
        judged = 0.5 * (torch.nn.functional.softplus(-real).mean() + torch.nn.functional.softplus(fake).mean())
    else:
        judged = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    return nll + regular + started * weight * doubt, started * judged, {"d_weight": weight, "g_loss": doubt}


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 3])  # 3 has the discriminator, too
def test_autoencoder_objective_matches_pytorch(case, step):
    """1e-4 of each value; 5e-4 of the length of each network's gradient, and of the longest of its parameters' for each
    of them: a rounding error decides which side of ReLU's kink some of VGG's two million activations are on, and the
    gradients of this very reference in float32 and in float64 differ by as much as 2.1e-4 of the longest. The
    discriminator begins at step 3."""
    gradient, params, changes, modules = case
    vae, config, critic, _ = modules
    image = np.random.default_rng(step).integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    key = jax.random.key(step)
    learned = {name: params[name] for name in ("vae", "discriminator", "logvar") if name in params}
    frozen = {name: part for name, part in params.items() if name not in learned}
    (value, metrics), gradients = gradient(learned, frozen, image, key, np.int32(step))
    latent_key = jax.random.split(key)[1]
    noise = np.asarray(jax.random.normal(latent_key, (BATCH, SIDE // 4, SIDE // 4, config.latent_channels)))
    x = channels_first(image.astype(np.float32) / 127.5 - 1.0)
    logvar = torch.tensor(float(params.get("logvar", {"value": 0.0})["value"]), requires_grad=True)
    own, judged, log = reference(modules, changes, x, channels_first(noise), logvar, step >= 3)
    # What the original sums over an image is a mean here.
    scale = x[0].numel() if isinstance(vae, diffusers.AutoencoderKL) else 1
    for module in (vae, critic):
        module.zero_grad()
    own.backward(retain_graph=True)
    own_gradients = {name: parameter.grad.clone() / scale for name, parameter in vae.named_parameters()}
    critic.zero_grad()
    judged.backward()
    expected = float((own.detach() / scale + judged.detach()).detach())
    assert float(value) == pytest.approx(expected, rel=1e-4)
    if step >= 3:
        assert float(metrics["d_weight"]) * scale == pytest.approx(float(log["d_weight"]), rel=1e-4)
        assert float(metrics["g_loss"]) == pytest.approx(float(log["g_loss"].detach()), rel=1e-4)
    if "logvar" in gradients:
        assert float(gradients["logvar"]["value"]) == pytest.approx(float(logvar.grad) / scale, rel=1e-4)
    tables = {
        "vae": (vae, own_gradients, conversion.TABLE, conversion.shapes(config)),
        "discriminator": (
            critic,
            {name: parameter.grad for name, parameter in critic.named_parameters()},
            perceptual.discriminator_table(2),
            perceptual.discriminator_shapes(2),
        ),
    }
    for name, (module, theirs, table, shapes) in tables.items():
        kept = {key: parameter.data.clone() for key, parameter in module.named_parameters()}
        for key, parameter in module.named_parameters():
            parameter.data = theirs[key]
        wanted, found = flatten(translated(module, table, shapes)), flatten(gradients[name])
        for key, parameter in module.named_parameters():
            parameter.data = kept[key]
        largest = max(float(np.linalg.norm(leaf)) for leaf in wanted.values())
        assert (largest > 0) == (name == "vae" or step >= 3)
        errors = {key: float(np.linalg.norm(found[key] - leaf)) for key, leaf in wanted.items()}
        assert {key: error for key, error in errors.items() if error > 5e-4 * largest} == {}
        whole = np.linalg.norm([np.linalg.norm(leaf) for leaf in wanted.values()])
        assert np.linalg.norm(list(errors.values())) <= 5e-4 * whole


def test_without_vgg_a_run_says_so_and_goes_on(pictures, tmp_path, monkeypatch, caplog):
    for name in ("SDJAX_WEIGHTS", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with caplog.at_level("WARNING"):
        task = make(config_of("kl_f4_tiny", pictures), make_mesh({"data": -1}))
    assert "vgg16-397923af.pth" in caplog.text
    assert task.frozen == {}


def test_each_network_has_its_own_optimiser(pictures, tmp_path, monkeypatch):
    """With a rate of 0 for the discriminator it rests while the autoencoder learns, and the other way round; what their
    gradients are, the objective's test says."""
    for name in ("SDJAX_WEIGHTS", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for resting in ("discriminator", "vae"):
        config = config_of("vq_f4_tiny", pictures, start=0)
        config.optim.learning_rate = 0.0 if resting == "vae" else 1e-3
        config.optim.components.discriminator.learning_rate = 1e-3 if resting == "vae" else 0.0
        task, optimizer = make(config, make_mesh({"data": -1})), make_optimizer(config.optim, 4)
        params = drawn(jax.eval_shape(task.init, jax.random.key(0)))

        @jax.jit
        def first_update(params, optimizer=optimizer):
            return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]

        moved = {name: largest(part) for name, part in first_update(params).items()}
        assert moved[resting] == 0.0
        assert min(value for name, value in moved.items() if name != resting) > 1e-4


def largest(tree) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("task", {"reconstruction": "l3"}, "unknown reconstruction loss 'l3' in config.task.reconstruction"),
        ("task", {"crop": 30}, "task.crop=30 must be multiples of 4"),
        ("discriminator", {"criterion": "wgan"}, "unknown criterion 'wgan' in config.task.discriminator.criterion"),
        (
            "discriminator",
            {"layers": 5},
            "task.crop=48 is too small for a discriminator of task.discriminator.layers=5",
        ),
        ("model", {"variant": "kl_f64"}, "unknown variant 'kl_f64' in config.model.autoencoder.variant"),
        ("optim", {"rate": 1.0}, "unknown setting 'rate' in config.optim.components.discriminator"),
    ],
)
def test_bad_configs_are_one_line(pictures, section, changes, message):
    config = config_of("kl_f4_tiny", pictures)
    places = {
        "task": config.task,
        "discriminator": config.task.discriminator,
        "model": config.model.autoencoder,
        "optim": config.optim.components.discriminator,
    }
    with places[section].unlocked():
        places[section].update(changes)
    with pytest.raises(UserError) as error:
        make(config, make_mesh({"data": -1})), make_optimizer(config.optim, 4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
