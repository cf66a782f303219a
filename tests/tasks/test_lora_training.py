"""LoRA is learnt beside a model that stays as it is, and is what diffusers takes it for."""

from __future__ import annotations

from pathlib import Path

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from test_stable_diffusion import written

import sdjax
import train
from configs import lora, stable_diffusion_training
from sdjax.checkpoints.checkpoint import FORMATS
from sdjax.checkpoints.layouts.diffusers import read_folder
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, merge, size
from sdjax.models.clip import VARIANTS as TEXTS
from sdjax.models.conditioning import apply
from sdjax.models.lora import Adaptation, add_factors
from sdjax.models.unet import VARIANTS as UNETS
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.lora import TARGETS, Adapter
from sdjax.tasks.make import make_task
from sdjax.training.optim import make_optimizer
from sdjax.training.step import init_state, make_step
from sdjax.training.task import split_frozen

EVERYTHING = ("attention", "feed_forward", "projections", "convolutions", "text_attention", "text_feed_forward")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder of Stable Diffusion's shape for images of 16 pixels."""
    small = stable_diffusion_training.get_config("sd1_tiny")
    small.model.unet.update(channels=(32, 32), depths=(1, 0), heads=(2, 2))
    small.model.autoencoder.channels, small.data.size = (8,), 16
    return written(small, tmp_path_factory.mktemp("base") / "model")


def config_of(base: Path, pictures: Path, **changes: object):
    config = lora.get_config(str(base))
    config.data.source, config.data.crop = f"folder:{pictures}", "centre"
    config.task.lora.update(targets=EVERYTHING, rank=3, alpha=1.5, conv_rank=2, conv_alpha=1.5, **changes)
    config.optim.learning_rate = 1e-2
    config.train.update(steps=4, batch_size=8, sample_every=0, checkpoint_every=2, log_every=1)
    return config


def test_factors_learn_and_all_else_is_frozen(base, pictures):
    """In another type where the config asks for it; alphas act as scales, and DoRA's lengths are the kernels'."""
    config, mesh = config_of(base, pictures, dora=True, dropout=0.1), make_mesh({"data": -1})
    config.train.frozen_dtype = "bfloat16"
    task = make_task(config, mesh)
    learnt = flatten(jax.eval_shape(task.init, jax.random.key(0)))
    assert {name.split("/lora/0/")[1] for name in learnt} == {"down", "up", "magnitude"}
    assert {leaf.dtype for leaf in learnt.values()} == {jnp.dtype("float32")}
    params = flatten(task.pretrained(sharded_put(mesh)))
    for name, like in flatten(task.frozen).items():
        assert (params[name].shape, params[name].dtype) == (like.shape, like.dtype), name
    kernel = params["unet/conv_in/kernel"]
    assert kernel.dtype == jnp.bfloat16
    at = "unet/down_blocks_0_attentions_0/transformer_blocks_0/attn1/to_q"
    assert params[f"{at}/lora/0/scale"] == 0.5
    assert params["unet/down_blocks_0_resnets_0/conv1/lora/0/scale"] == 0.75  # rank 2
    lengths = np.linalg.norm(np.float32(params[f"{at}/kernel"]), axis=0)
    np.testing.assert_allclose(params[f"{at}/lora/0/magnitude"], lengths, rtol=1e-6)


TRANSFORMERS = ("attention", "feed_forward", "projections")


@pytest.mark.parametrize(
    ("component", "config", "targets", "layers", "learnt"),
    [
        ("unet", UNETS["sd1"], ("attention",), 128, 797_184),  # what diffusers' scripts train at rank 4
        ("unet", UNETS["sd1"], TRANSFORMERS, 192, None),
        ("unet", UNETS["sdxl"], TRANSFORMERS, 722, None),
        ("text_encoder", TEXTS["clip_l"], ("text_attention", "text_feed_forward"), 72, None),
        ("text_encoder_2", TEXTS["openclip_bigg"], ("text_attention", "text_feed_forward"), 192, None),
    ],
)
def test_published_sizes(component, config, targets, layers, learnt):
    """The layers that kohya-ss/sd-scripts adapts, and the parameters of diffusers' LoRA of Stable Diffusion 1.

    What is learnt is kept four times, in float32: itself, its average and two moments. That is 13 MB, of 14 GB for all
    of the UNet.
    """
    patterns = [pattern for target in targets for pattern in TARGETS[target]]
    shapes = {component: FORMATS[component].shapes(config)}
    made = jax.eval_shape(lambda p: add_factors(p, patterns, Adaptation(rank=4), jax.random.key(0)), shapes)
    factors = {name: leaf for name, leaf in flatten(made).items() if name.endswith(("/down", "/up"))}
    assert len(factors) == 2 * layers
    if learnt is not None:
        assert sum(leaf.size for leaf in factors.values()) == learnt
        assert learnt < 0.001 * size(shapes)


def test_the_penalty_in_numbers():
    """Sum of (|past| x own)^2 for past [[1, -2], [0, 3]] and own [[0.5, 1], [2, -1]]: 0.25 + 4 + 0 + 9."""
    eye, halved = jnp.eye(2), jnp.float32(0.5)
    past = {"down": jnp.array([[1.0, -2.0], [0.0, 3.0]]), "up": eye, "scale": jnp.float32(1.0)}
    own = {"down": jnp.array([[1.0, 2.0], [4.0, -2.0]]), "up": eye, "scale": halved}
    params = {"unet": {"to_k": {"kernel": eye, "lora": {"0": past, "1": own}}, "to_q": {"kernel": eye}}}
    assert Adapter(("unet/to_k",), entries=1, forgetting=2.0).penalty(params) == 2 * 13.25
    halves = {name: {**past, "scale": halved} for name in ("0", "1")}
    params["unet"]["to_k"]["lora"] = {**halves, "2": own}
    assert Adapter(("unet/to_k",), entries=2, forgetting=1.0).penalty(params) == 13.25


def test_the_penalty_is_a_part_of_the_loss(base, pictures, tmp_path):
    """By its weight, of a layer's changes before and of its own."""
    rng, mesh, at = (
        np.random.default_rng(0),
        make_mesh({"data": -1}),
        "mid_block_attentions_0/transformer_blocks_0/attn1",
    )
    past = {role: rng.standard_normal(shape).astype(np.float32) for role, shape in (("A", (2, 32)), ("B", (32, 2)))}
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{stem}.lora_{role}.weight": factor for role, factor in past.items()}, tmp_path / "past.safetensors")
    tasks = []
    for weight in (0.0, 0.25):
        config = config_of(base, pictures, past=(str(tmp_path / "past.safetensors"),), forgetting=weight)
        config.task.lora.update(targets=(f"unet/{at}/to_q",))
        tasks.append(make_task(config, mesh))
    params = merge(tasks[0].pretrained(sharded_put(mesh)), tasks[0].init(jax.random.key(0)))
    own = params["unet"]["mid_block_attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]["lora"]["1"]
    own["up"] = 0.1 * jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    batch = next(tasks[0].batch(params))
    losses = jax.jit(lambda params: [task.loss(params, batch, jax.random.key(1), 0) for task in tasks])(params)
    (plain, _), (whole, metrics) = losses
    expected = 0.25 * np.square((past["B"] @ past["A"]).T * (0.5 * own["down"] @ own["up"])).sum()
    np.testing.assert_allclose(metrics["forgetting"], expected, rtol=1e-4)
    np.testing.assert_allclose(whole - plain, expected, rtol=1e-3)


def test_the_penalty_makes_concepts_forgotten_less():
    """Four words learnt one after another, each by a layer's factors of rank 2: all are learnt, and the first three are
    worse off by less than half of what plain LoRA does to them."""
    rng, size = np.random.default_rng(0), 24
    words, wanted = (jnp.asarray(rng.standard_normal((4, size)) + shift, jnp.float32) for shift in (0.5, 0.0))
    layer, optimizer = nn.Dense(size, use_bias=False), optax.adam(2e-2)
    adapter = Adapter(("layer",), entries=1, forgetting=1.0)

    def tree(past, own):
        before = {"down": past, "up": jnp.eye(size), "scale": jnp.float32(1.0)}
        return {
            "layer": {"kernel": jnp.zeros((size, size)), "lora": {"0": before, "1": {**own, "scale": jnp.float32(1.0)}}}
        }

    def error(past, own, word):
        return jnp.square(apply(layer, tree(past, own)["layer"], words[word]) - wanted[word]).mean()

    @jax.jit
    def learn(past, word, weight):
        own = {"down": jax.random.normal(jax.random.key(word), (size, 2)) / 2, "up": jnp.zeros((2, size))}

        def step(carry, _):
            own, state = carry
            loss = jax.grad(lambda own: error(past, own, word) + weight * adapter.penalty(tree(past, own)))
            updates, state = optimizer.update(loss(own), state)
            return (optax.apply_updates(own, updates), state), None

        (own, _), _ = jax.lax.scan(step, (own, optimizer.init(own)), length=400)
        none = jax.tree.map(jnp.zeros_like, own)
        past = past + own["down"] @ own["up"]
        return past, jax.vmap(lambda word: error(past, none, word))(jnp.arange(4))

    worse = {}
    for weight in (0.0, 1.0):
        past, errors = jnp.zeros((size, size)), []
        for word in range(4):
            past, found = learn(past, word, weight)
            errors.append(found)
        learnt = jnp.diagonal(jnp.array(errors))
        assert learnt.max() < 1e-2
        worse[weight] = float((errors[-1] - learnt)[:3].mean())
    print(worse)
    assert 0.0 < worse[1.0] < 0.5 * worse[0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"config\.task\.lora\.rank=0 must be at least 1"),
        ({"targets": ("atention",)}, r"'atention' names no dense or convolutional layer, such as 'unet/"),
        ({"past": ("nowhere",)}, r"nowhere"),
        ({"init": "kaimin"}, r"unknown init 'kaimin' in config\.task\.lora\.init; choose one of: gaussian, kaiming"),
        ({"dropout": 1.0}, r"config\.task\.lora\.dropout=1\.0 must be at least 0 and less than 1"),
    ],
)
def test_mistakes_are_said_in_a_line(changes, message, base, pictures):
    config = config_of(base, pictures)
    config.task.lora.update(changes)
    with pytest.raises(UserError, match=message) as error:
        make_task(config, make_mesh({"data": -1}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["hada", "dora_scale", "lora_magnitude_vector"])
def test_a_past_that_changes_weights_is_refused(kind, base, pictures, tmp_path):
    """Training applies branches alone, so that LoHa and DoRA would be left out or misread."""
    width, stem = 32, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up, ones = np.ones((2, width), np.float32), np.ones((width, 2), np.float32), np.ones(width, np.float32)
    factors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(
        {
            "hada": {f"{stem}.hada_w{i}_{side}": {"a": up, "b": down}[side] for i in (1, 2) for side in "ab"},
            "dora_scale": {**factors, f"{stem}.dora_scale": ones[:, None]},
            "lora_magnitude_vector": {**factors, f"{stem}.lora_magnitude_vector": ones},
        }[kind],
        tmp_path / "past.safetensors",
    )
    config = config_of(base, pictures)
    config.task.lora.past = (str(tmp_path / "past.safetensors"),)
    with pytest.raises(UserError, match=r"^config\.task\.lora\.past: .*changes weights.*; merge it into the base$"):
        make_task(config, make_mesh({"data": -1}))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"dora": True, "dropout": 0.2}], ids=["lora", "dora"])
def test_nothing_else_changes_and_the_loss_falls(changes, base, pictures):
    config, mesh = config_of(base, pictures, **changes), make_mesh({"data": -1})
    task, optimizer = make_task(config, mesh), make_optimizer(config.optim, 60)
    frozen, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
    before = jax.tree.map(np.array, frozen)
    state = init_state(task, optimizer, 0, mesh, initial)
    step, batch = make_step(task, optimizer, 0, decay=0.0), next(task.batch(merge(frozen, state.params)))
    losses = []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    print("loss", np.mean(losses[:10]), np.mean(losses[-10:]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


@pytest.mark.slow
def test_a_trained_lora_is_the_same_in_diffusers(base, pictures, tmp_path, monkeypatch):
    """Images to 1e-3 by either file, with alphas that are not the ranks; a run that stopped goes on to the bit."""
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    folder = train.train_and_evaluate(config_of(base, pictures), tmp_path / "run")
    stopped = config_of(base, pictures)
    stopped.train.steps = 2
    train.train_and_evaluate(stopped, tmp_path / "stopped")
    again = train.train_and_evaluate(config_of(base, pictures), tmp_path / "stopped")
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    side = read_folder(base).components["unet"].extra["sample_size"]
    latents = np.random.default_rng(0).standard_normal((1, side, side, 4)).astype(np.float32)
    call = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
    unchanged = sdjax.load(base)("a cat", steps=3, guidance_scale=2.0, latents=latents)
    found = sdjax.load(base, lora=[str(tmp_path / "run")])("a cat", steps=3, guidance_scale=2.0, latents=latents)
    assert np.abs(found - unchanged).max() > 0.02
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(base)
    theirs.set_progress_bar_config(disable=True)
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        theirs.load_lora_weights(folder, weight_name=name, adapter_name=name[:3])
        made = theirs("a cat", latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)), **call).images
        print(name, "difference", np.abs(made - found).max())
        np.testing.assert_allclose(made, found, atol=1e-3, rtol=0)
        theirs.unload_lora_weights()
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(base)
        theirs.set_progress_bar_config(disable=True)


def test_new_words_are_written_beside_the_factors(base, pictures, tmp_path):
    """Pivotal tuning: a run may learn both, and both are loaded from its folder."""
    config = config_of(base, pictures)
    with config.unlocked():
        config.task.update(word="<new>", initializer="cat", vectors=1)
    config.train.trainable = ("*/lora/0/*", "text_encoder/token_embedding/words")
    mesh = make_mesh({"data": -1})
    task = make_task(config, mesh)
    params = merge(task.init(jax.random.key(0)), task.pretrained(sharded_put(mesh)))
    task.export(params, tmp_path / "export")
    assert task.use.split(" --")[2:4] == ["lora {workdir}", "embedding {workdir}/export/embeddings"]
    embeddings, lora = [tmp_path / "export/embeddings"], [str(tmp_path / "export")]
    pipe = sdjax.load(base, lora=lora, embeddings=embeddings)
    table = pipe.params["text_encoder"]["token_embedding"]["embedding"]
    (cat,) = pipe.tokenizers["text_encoder"].tokens("cat")[0].ids
    np.testing.assert_array_equal(table[-1], params["text_encoder"]["token_embedding"]["embedding"][cat])
