from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_checkpoints import random_params, write_tokenizer

from sdjax.checkpoints.checkpoint import Checkpoint, Component
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint
from sdjax.checkpoints.networks import autoencoder, clip, unet
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.models.autoencoder import Autoencoder, AutoencoderConfig
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet, UNetConfig

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tokenizer = tmp_path_factory.mktemp("source") / "tokenizer"
    vocab_size = write_tokenizer(tokenizer)
    sizes = UNetConfig(channels=(16, 32), depths=(1, 0), heads=(2, 4), context_dim=24, groups=8, layers_per_block=1)
    vae = AutoencoderConfig(channels=(8, 16), layers_per_block=1, groups=8, scaling_factor=0.9)
    text = CLIPTextConfig(
        vocab_size=vocab_size, width=24, layers=2, heads=3, feed_forward=32, max_length=12, eos_token_id=vocab_size - 1
    )
    own = {"sample_size": 8, "torch_dtype": "float16"}
    return Checkpoint(
        components={
            "unet": Component(sizes, random_params(unet.shapes(sizes), 0), own),
            "vae": Component(
                vae, random_params(autoencoder.shapes(vae), 1), {"sample_size": 16, "force_upcast": False}
            ),
            "text_encoder": Component(text, random_params(clip.shapes(text), 2), {"bos_token_id": vocab_size - 2}),
        },
        scheduler=SCHEDULER,
        tokenizers={"text_encoder": tokenizer},
    )


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "deeper" / "model"
    write_checkpoint(path, checkpoint, "float32")
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_diffusers_loads_the_folder(checkpoint: Checkpoint, folder: Path):
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.force_upcast, pipe.unet.config.sample_size) == (
        0.9,
        False,
        8,
    )
    ids = pipe.tokenizer(
        ["a photo of cat", "heart"], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert ids.shape == (2, 12)
    assert ids[0, 5] == checkpoint.components["text_encoder"].config.eos_token_id, "words are single tokens"

    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((2, 8, 8, 4), np.float32), np.float32([7.0, 500.0])
    with torch.no_grad():
        text = pipe.text_encoder(ids)
        first = torch.from_numpy(x).permute(0, 3, 1, 2)
        noise = pipe.unet(first, torch.from_numpy(t), text.last_hidden_state).sample
        pictures = pipe.vae.decode(first).sample

    def close(ours: jax.Array, theirs: torch.Tensor) -> None:
        theirs = np.moveaxis(theirs.numpy(), 1, -1) if theirs.ndim == 4 else theirs.numpy()
        assert theirs.std() > 0.05
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)

    read = read_folder(folder).components
    states = CLIPText(read["text_encoder"].config).apply({"params": read["text_encoder"].params}, ids.numpy())
    close(states.last, text.last_hidden_state)
    close(states.pooled, text.pooler_output)
    predict = jax.jit(UNet(read["unet"].config).apply)
    close(predict({"params": read["unet"].params}, x, t, Cond(context=states.last)), noise)
    decode = jax.jit(lambda params, z: Autoencoder(read["vae"].config).apply({"params": params}, z, method="decode"))
    close(decode(read["vae"].params, x), pictures)
    assert pipe("red heart", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_diffusers_round_trip(checkpoint: Checkpoint, folder: Path, tmp_path: Path):
    StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).save_pretrained(tmp_path / "theirs")
    found = read_folder(tmp_path / "theirs")
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = checkpoint.components[name], found.components[name]
        assert theirs.config == ours.config
        expected, params = flatten(ours.params), flatten(theirs.params)
        assert params.keys() == expected.keys()
        assert all(np.array_equal(params[key], expected[key]) for key in expected), name
    assert SCHEDULER.items() <= {**found.scheduler}.items() | {("_class_name", "DDIMScheduler")}


def test_reading_and_writing_again_gives_the_same_files(folder: Path, tmp_path: Path):
    write_checkpoint(tmp_path / "again", read_folder(folder), "float32")
    assert files_of(tmp_path / "again") == files_of(folder)


def test_half_precision(checkpoint: Checkpoint, tmp_path: Path):
    write_checkpoint(tmp_path / "half", checkpoint, "float16")
    found = read_folder(tmp_path / "half", "bfloat16")
    kernel = np.asarray(checkpoint.components["unet"].params["conv_in"]["kernel"])
    assert found.components["unet"].params["conv_in"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        found.components["unet"].params["conv_in"]["kernel"],
        kernel.astype(np.float16).astype(jnp.bfloat16),
        strict=True,
    )
    assert (tmp_path / "half/unet/diffusion_pytorch_model.safetensors").stat().st_size < 0.6 * sum(
        leaf.size * 4 for leaf in flatten(checkpoint.components["unet"].params).values()
    )
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        read_folder(tmp_path / "half", "int8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_diffusers_loads_half_precision_without_a_type(dtype: str, checkpoint: Checkpoint, folder: Path, tmp_path):
    """All in float32, as it loads its own networks; transformers alone would keep the type of a file."""
    write_checkpoint(tmp_path / "half", checkpoint, dtype)
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32))
    images = []
    for path in (tmp_path / "half", folder):
        pipe = StableDiffusionPipeline.from_pretrained(path)
        pipe.set_progress_bar_config(disable=True)
        assert {part.dtype for part in (pipe.text_encoder, pipe.unet, pipe.vae)} == {torch.float32}
        images.append(pipe("red heart", num_inference_steps=2, latents=latents, output_type="np").images)
    np.testing.assert_allclose(*images, atol=1e-2 if dtype == "float16" else 1e-1)


VAE_FILE = "diffusion_pytorch_model.safetensors"


def shard(source: Path, infix: str) -> None:
    """The tensors of a file in two files and an index, as diffusers names them, in place of the file."""
    tensors = load_file(source)
    stem, names, weight_map = source.name.removesuffix(".safetensors"), sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002{infix}.safetensors"
        save_file({name: tensors[name] for name in part}, source.parent / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source.parent / f"{source.name}.index{infix}.json").write_text(json.dumps({"weight_map": weight_map}))
    source.unlink()


def pickled(source: Path, name: str) -> None:
    torch.save(load_file(source), source.with_name(name))
    source.unlink()


def as_diffusers_itself_shards(source: Path) -> None:
    AutoencoderKL.from_pretrained(source.parent, local_files_only=True).save_pretrained(
        source.parent, max_shard_size="20KB", variant="fp16"
    )
    assert len(list(source.parent.glob("*fp16*.safetensors"))) > 1
    source.unlink()


@pytest.mark.parametrize(
    "move",
    [
        lambda file: file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors")),
        lambda file: shard(file, ""),
        lambda file: shard(file, ".fp16"),
        as_diffusers_itself_shards,
        lambda file: pickled(file, "diffusion_pytorch_model.bin"),
        lambda file: pickled(file, "diffusion_pytorch_model.fp16.bin"),
    ],
    ids=["fp16", "shards", "fp16 shards", "diffusers' fp16 shards", "pickle", "fp16 pickle"],
)
def test_weights_are_found_wherever_diffusers_puts_them(copy: Path, move):
    expected = flatten(read_folder(copy).components["vae"].params)
    move(copy / "vae" / VAE_FILE)
    found = flatten(read_folder(copy).components["vae"].params)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_transformers_names_its_pickle_otherwise(copy: Path):
    expected = flatten(read_folder(copy).components["text_encoder"].params)
    pickled(copy / "text_encoder" / "model.safetensors", "pytorch_model.bin")
    found = flatten(read_folder(copy).components["text_encoder"].params)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_packed_weights_are_refused_though_there_are_plain_ones(copy: Path):
    with pytest.raises(UserError, match="variant '8bit': weights packed by bitsandbytes are not read"):
        read_folder(copy, variant="8bit")


def test_the_variant_that_is_asked_for_comes_first(copy: Path):
    """The half-precision file here holds other numbers, so that it can be told from the plain one."""
    plain = copy / "vae" / VAE_FILE
    doubled = {name: tensor * 2 for name, tensor in load_file(plain).items()}
    save_file(doubled, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    kernel = read_folder(copy).components["vae"].params["quant_conv"]["kernel"]
    half = read_folder(copy, variant="fp16")
    np.testing.assert_array_equal(half.components["vae"].params["quant_conv"]["kernel"], 2 * kernel)
    unet_config = read_folder(copy).components["unet"].config
    assert half.components["unet"].config == unet_config, "where there is no such file, the plain one is read"
    plain.unlink()
    plain.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(UserError, match=r"vae holds no diffusion_pytorch_model\.safetensors"):
        read_folder(copy)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "no checkpoint folder"),
        (lambda f: (f / "model_index.json").unlink(), "cannot read .*model_index.json"),
        (lambda f: edit_json(f / "model_index.json", transformer=["diffusers", "X"]), "lists transformer .*XL, which"),
        (lambda f: edit_json(f / "model_index.json", text_encoder_2=["transformers", "X"]), "tokenizer_2 holds no tok"),
        (lambda f: edit_json(f / "model_index.json", text_encoder=[None, None]), "lists no text_encoder"),
        (lambda f: shutil.rmtree(f / "vae"), "cannot read .*vae/config.json"),
        (lambda f: (f / "unet/config.json").write_text("{"), "unet/config.json is not JSON"),
        (lambda f: edit_json(f / "unet/config.json", class_embed_type="timestep"), "class_embed_type = 'timestep'"),
        (lambda f: edit_json(f / "unet/config.json", cross_attention_dim=32), "of another shape: .*attn2.to_k.weight"),
        (lambda f: edit_json(f / "text_encoder/config.json", num_hidden_layers=1), "unexpected: .*layers.1."),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json"),
        (lambda f: (f / "tokenizer/merges.txt").unlink(), "holds no tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(copy: Path, damage, words: str):
    damage(copy)
    with pytest.raises(UserError, match=words):
        read_folder(copy)


def test_writing_over_a_folder_keeps_what_is_the_users(checkpoint: Checkpoint, copy: Path, tmp_path: Path):
    (copy / "README.md").write_text("a model card")
    (copy / "pictures").mkdir()
    (copy / "pictures" / "0.png").write_bytes(b"png")
    changed = dataclasses.replace(checkpoint, scheduler=SCHEDULER | {"steps_offset": 0})
    write_checkpoint(copy, changed)
    assert (copy / "README.md").read_text() == "a model card"
    assert (copy / "pictures" / "0.png").exists()
    assert read_folder(copy).scheduler["steps_offset"] == 0
    assert list(tmp_path.iterdir()) == [copy], "nothing temporary is left"


def test_a_folder_that_is_not_ours_is_left_alone(checkpoint: Checkpoint, copy: Path, tmp_path: Path):
    edit_json(copy / "model_index.json", _writer=None)
    (tmp_path / "file").write_text("text")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("text")
    for target in (copy, tmp_path / "file", tmp_path / "notes"):
        with pytest.raises(UserError, match="was not written by sdjax"):
            write_checkpoint(target, checkpoint)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "text"


def test_a_write_that_fails_leaves_the_old_folder(checkpoint: Checkpoint, copy: Path, tmp_path: Path):
    before = files_of(copy)
    vae = checkpoint.components["vae"]
    params = dict(vae.params)
    params["quant_conv"] = {"kernel": np.full((1, 1, 8, 8), np.inf, np.float32), "bias": np.zeros(8, np.float32)}
    with pytest.raises(UserError, match=r"quant_conv\.weight holds values that are not finite"):
        write_checkpoint(copy, checkpoint.replace_component("vae", dataclasses.replace(vae, params=params)))
    wrong = dataclasses.replace(vae, params={"quant_conv": params["quant_conv"]})
    with pytest.raises(UserError, match="the vae to be written does not fit"):
        write_checkpoint(copy, checkpoint.replace_component("vae", wrong))
    with pytest.raises(UserError, match="_class_name"):
        write_checkpoint(copy, dataclasses.replace(checkpoint, scheduler={"beta_start": 1}))
    with pytest.raises(UserError, match="holds no tokenizer"):
        write_checkpoint(copy, dataclasses.replace(checkpoint, tokenizers={"text_encoder": tmp_path}))
    assert files_of(copy) == before
    assert list(tmp_path.iterdir()) == [copy]
