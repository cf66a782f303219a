"""DreamBooth beside diffusers' training script, and the images of a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from configs import custom_diffusion, dreambooth, lora, textual_inversion
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, merge
from sdjax.diffusion.loss import diffusion_loss
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks import class_images
from sdjax.tasks.finetune import from_checkpoint
from sdjax.tasks.make import make_task
from sdjax.tasks.objective import objective_of

PROMPT, CLASS = "a photo of sks cat", "a photo of cat"


@pytest.fixture
def classes(tmp_path) -> Path:
    """Five images of a class, larger than those that are learnt."""
    folder, rng = tmp_path / "classes", np.random.default_rng(1)
    folder.mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def config_of(base: Path, images: Path, classes: Path, **task: Any):
    config = dreambooth.get_config(str(base))
    config.data.update(source=f"pictures:{images}", prompt=PROMPT)
    config.data.update(class_folder=str(classes), class_prompt=CLASS, class_images=5)
    config.task.update(prior_weight=0.7, **task)
    config.train.batch_size = 2
    return config


def opened(config):
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh)
    return task, task.pretrained(sharded_put(mesh))


def script_loss(folder: Path, config: Any, batch: Any, key: jax.Array) -> float:
    """The loss of diffusers' examples/dreambooth/train_dreambooth.py from the draws of a key of this library.

    Its min-SNR weights are those of the timesteps of the instances, which alone have them.
    """
    latent_key, rest, _ = jax.random.split(key, 3)
    noise_key, time_key = jax.random.split(rest)
    count, side = 2 * len(batch["image"]), batch["image"].shape[1] // 2
    # Here an image and one of the class follow each other; there all instances come first.
    order = [*range(0, count, 2), *range(1, count, 2)]
    draws = [np.array(jax.random.normal(k, (count, side, side, 4)))[order] for k in (latent_key, noise_key)]
    draw, noise = (torch.tensor(x).permute(0, 3, 1, 2) for x in draws)
    t = torch.tensor(np.array(jax.random.randint(time_key, (count,), 0, 1000))[order])
    images = np.concatenate([batch["image"], batch["prior_image"]]).astype(np.float32) / 127.5 - 1.0
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = diffusers.DDPMScheduler.from_config(diffusers.DDIMScheduler.load_config(folder / "scheduler"))
    with torch.no_grad():
        found = vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
        x0 = (found.mean + found.std * draw) * vae.config.scaling_factor
        prompts = [PROMPT] * (count // 2) + [CLASS] * (count // 2)
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = unet(scheduler.add_noise(x0, noise, t), t, encoder(ids).last_hidden_state).sample
    (own, of_class), (target, of_target) = output.chunk(2), noise.chunk(2)
    losses = torch.nn.functional.mse_loss(own, target, reduction="none").mean((1, 2, 3))
    if config.task.weighting == "min_snr":
        abar = scheduler.alphas_cumprod[t.chunk(2)[0]]
        snr = abar / (1 - abar)
        losses = losses * torch.minimum(snr, torch.tensor(5.0)) / snr
    return float(losses.mean() + config.task.prior_weight * torch.nn.functional.mse_loss(of_class, of_target))


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("weighting", "targets"),
    [("simple", ()), pytest.param("min_snr", (), **SLOW), pytest.param("simple", ("attention",), **SLOW)],
)
def test_the_loss_is_that_of_diffusers_script(weighting, targets, bases, few, classes):
    """From pixels and prompts on, to 1e-5 of it; min-SNR weights are for the instances alone.

    Factors of LoRA, which then are all that is trained, change nothing at first.
    """
    config = config_of(bases("sd1"), few, classes, weighting=weighting)
    if targets:
        config.task.lora.targets = targets
    task, params = opened(config)
    if targets:
        factors = jax.jit(task.init)(jax.random.key(0))
        assert all("/lora/0/" in name for name in flatten(factors))
        params = merge(factors, params)
    batch, key = next(task.batch(params)), jax.random.key(1)
    assert {name: column.shape for name, column in batch.items()} == {
        name: spec.shape for name, spec in task.batch_spec(2).items()
    }
    value, _ = jax.jit(task.loss)(params, batch, key, 0)
    assert float(value) == pytest.approx(script_loss(bases("sd1"), config, batch, key), rel=1e-5)


UNET, WORDS, ENCODER = "unet/conv_in/kernel", "text_encoder/token_embedding/words", "text_encoder/layers_0"


@pytest.mark.parametrize(
    ("recipe", "form", "trainable"),
    [
        (dreambooth, "model", None),
        (dreambooth, "lora", None),
        (dreambooth, "lora", ("unet",)),
        (lora, "lora", ("*/lora/0/*", ENCODER)),
        (custom_diffusion, "custom_diffusion", (WORDS, "unet/*attn2/*", ENCODER)),
        (custom_diffusion, "custom_diffusion", (WORDS, UNET)),
        (textual_inversion, "embeddings", (WORDS, UNET)),
    ],
)
def test_all_that_learns_is_exported(recipe, form, trainable, bases, few):
    """DreamBooth with a LoRA's targets learns its factors alone; what a form does not hold is refused before a run."""
    config = recipe.get_config(str(bases("sd1")))
    config.data.source = f"pictures:{few}"
    if form == "lora":
        config.task.lora.targets = ("attention",)
    if "initializer" in config.task:
        config.task.initializer = "cat"
    if trainable is None:
        task = make_task(config, make_mesh(config.mesh))
        learnt = flatten(jax.eval_shape(task.init, jax.random.key(0)))
        assert all(("/lora/0/" in name) == (form == "lora") and name.startswith("unet/") for name in learnt)
        return
    config.train.trainable = trainable
    message = rf"^config\.train\.trainable names [a-z_]*/[^ ]*, which the export '{form}' does not hold; it holds "
    with pytest.raises(UserError, match=message):
        make_task(config, make_mesh(config.mesh))


def test_rows_are_pairs_of_which_both_are_cut_anew(bases, few, classes):
    """An image of a few and one of the class, which is in no epoch twice and never cut the same."""
    config = config_of(bases("sd1"), few, classes)
    config.train.batch_size = 5
    task, params = opened(config)
    batches = task.batch(params)
    batch, later = next(batches), next(batches)
    known = {np.asarray(Image.open(path)).tobytes() for path in few.iterdir()}
    assert {image.tobytes() for image in batch["image"]} == known
    cut = [{image.tobytes() for image in own["prior_image"]} for own in (batch, later)]
    assert [len(images) for images in cut] == [5, 5]
    assert cut[0] != cut[1]
    ids = [np.unique(tokens, axis=0) for tokens in (batch["tokens"], batch["prior_tokens"])]
    assert [len(own) for own in ids] == [1, 1]
    assert not np.array_equal(*ids)


def test_without_weight_the_class_counts_for_nothing(bases, few, classes):
    """At 0 the loss is plain fine-tuning's of the instances, and no gradient comes from the class."""
    config = config_of(bases("sd1"), few, classes)
    objective, key = objective_of(from_checkpoint(config).task), jax.random.key(2)
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 2, 4)), jnp.float32)

    def loss(gain: jax.Array, prior: float | None) -> jax.Array:
        return objective.loss(lambda x, t: x * gain[:, None, None, None], x0, key, prior)

    value, gradient = jax.value_and_grad(loss)(jnp.full(4, 0.3), 0.0)
    x, noise, _, abar = (part[::2] for part in objective.noised(x0, key))
    assert float(value) == pytest.approx(float(diffusion_loss(x * 0.3, x0[::2], noise, abar, "epsilon").mean()))
    assert np.all(np.asarray(gradient)[1::2] == 0)
    assert np.all(np.asarray(gradient)[::2] != 0)
    both = [float(loss(jnp.full(4, 0.3), prior)) for prior in (1.0, None)]
    assert both[0] == pytest.approx(2 * both[1])


def test_class_images_are_made_until_there_are_enough(bases, few, classes, monkeypatch):
    """A run that is stopped goes on; a user's files stay; image i is of its number alone."""
    config = config_of(bases("sd1"), few, classes)
    config.data.class_images = 12
    task, params = opened(config)
    calls = []

    def sample(config, model, params, columns, size, first):
        calls.append(first)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.stack([np.full((*size, 3), (first + i) / 255) for i in range(len(columns["ids"]))])

    monkeypatch.setattr(class_images, "sample_columns", sample)
    before = {path: path.read_bytes() for path in classes.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        task.batch(params)
    assert len(list(classes.iterdir())) == 9
    task.batch(params)
    assert calls == [0, 4, 4]
    assert {path: path.read_bytes() for path in before} == before
    made = sorted(set(classes.iterdir()) - set(before))
    assert [path.name for path in made] == [f"class_{i:05d}.png" for i in range(7)]
    assert [int(np.asarray(Image.open(path)).max()) for path in made] == list(range(7))
    task.batch(params)
    assert len(calls) == 3


@pytest.mark.slow
def test_class_images_after_a_stop_are_those_of_one_run(bases, few, tmp_path):
    """2 + 4 images of the model equal, to the bit, 6 that were generated at once."""
    for name, counts in {"whole": (6,), "halves": (2, 6)}.items():
        for count in counts:
            config = config_of(bases("sd1"), few, tmp_path / name)
            config.data.class_images, config.sample.steps = count, 2
            task, params = opened(config)
            task.batch(params)
    whole, halves = ({p.name: np.asarray(Image.open(p)) for p in (tmp_path / n).iterdir()} for n in ("whole", "halves"))
    assert sorted(whole) == sorted(halves) == [f"class_{i:05d}.png" for i in range(6)]
    for name, image in whole.items():
        np.testing.assert_array_equal(image, halves[name], err_msg=name)
    assert len({image.tobytes() for image in whole.values()}) == 6


def test_a_class_without_a_prompt_is_one_line(bases, few, classes):
    config = config_of(bases("sd1"), few, classes)
    config.data.class_prompt = ""
    task, params = opened(config)
    with pytest.raises(UserError, match=r"^config\.data\.class_prompt='': give the prompt of the class's images$"):
        task.batch(params)
