"""Fine-tuning begins where a checkpoint of any kind is, and leaves one of the same kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from every_model import KINDS
from PIL import Image
from test_ldm_file import MODELS, original, save
from test_stable_diffusion import reference_loss, texts, written
from tiny_checkpoints import assert_same, tiny_checkpoint

import sdjax
import train
from configs import finetune, stable_diffusion_training
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.data.text.tokenizer_training import train_word_pieces
from sdjax.models import unet, unet2d
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.diffusion import checkpoint_of, make_model, read_pretrained
from sdjax.tasks.finetune import from_checkpoint
from sdjax.tasks.make import make_task
from sdjax.tasks.variants import section_of, sizes_of

CAPTIONS = ("red heart", "a cat", "a photo of a red cat", "")
CONDITIONED_ON_MORE = ("sdxl_refiner", "sd1_inpainting", "x4_upscaler", "sd2_depth")
OPEN = tuple(name for name in KINDS if name not in (*CONDITIONED_ON_MORE, "adm_classifier"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Images of one's own with captions, which are square: what is cut from others is tested elsewhere."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", OPEN)
def test_a_checkpoint_describes_its_own_training(name, folders):
    """Every network has its sizes and, frozen or trained, begins with its parameters to the bit."""
    stored = read_folder(folders(name))
    config = from_checkpoint(finetune.get_config(str(folders(name))))
    model, condition = make_model(config)
    names = set(stored.components)
    assert model.configs() == {name: component.config for name, component in stored.components.items()}
    assert config.task.scheduler.to_dict() == {"prediction_type": "epsilon", **stored.scheduler}
    read = read_pretrained(config, model, {"unet"}, names - {"unet"}, lambda array, at: array)
    wanted = flatten({name: component.params for name, component in stored.components.items()})
    assert flatten(read).keys() == wanted.keys()
    for key, array in flatten(read).items():
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
    side, channels = config.data.size // model.factor, model.channels
    assert model.latent_shape((config.data.size,) * 2) == (side, side, channels)
    assert condition.tokenizers == stored.tokenizers


@pytest.mark.parametrize("name", CONDITIONED_ON_MORE)
def test_models_of_more_than_captions_are_refused(name, folders):
    with pytest.raises(UserError, match=r"^config\.task\.initial: .* is conditioned on more than captions, [^\n]*$"):
        from_checkpoint(finetune.get_config(str(folders(name))))


def test_a_single_file_and_a_workdir_are_taken(folders, tmp_path):
    """A file has CLIP's own tokenizer; a run's export is found in its workdir."""
    made = tiny_checkpoint("sd2", TOKENIZER_FOLDERS / "open_clip", 49408, length=77)
    write_single_file(tmp_path / "model.safetensors", made)
    write_checkpoint(tmp_path / "run/export", made)
    for source in ("model.safetensors", "run"):
        config = from_checkpoint(finetune.get_config(str(tmp_path / source)))
        model, condition = make_model(config)
        assert model.configs() == {name: component.config for name, component in made.components.items()}
        assert condition.loaded["text_encoder"].encode(["a cat"])[0][:4].tolist() == [49406, 320, 2368, 49407]
        read = read_pretrained(config, model, {"unet"}, {"vae", "text_encoder"}, lambda array, at: array)
        np.testing.assert_array_equal(
            read["unet"]["conv_in"]["kernel"], made.components["unet"].params["conv_in"]["kernel"]
        )


def test_a_file_of_ldms_text_model_needs_a_vocabulary(tmp_path):
    """Its file has none; with a folder that has, it is as good as any checkpoint."""
    save(tmp_path / "model.ckpt", original("text")[0])
    config = finetune.get_config(str(tmp_path / "model.ckpt"))
    with pytest.raises(UserError, match=r"^config\.model\.tokenizer: .*model\.ckpt has none; give the folder with "):
        from_checkpoint(config)
    train_word_pieces(["a red heart"], tmp_path / "words", 80)
    config.model.tokenizer = str(tmp_path / "words")
    model, condition = make_model(from_checkpoint(config))
    assert model.configs()["bert"] == MODELS["text"][2]["bert"]
    assert condition.tokenizers == {"bert": tmp_path / "words"}


def test_the_null_condition_stays_what_the_index_says(folders, tmp_path):
    """Of an SDXL model without zeros for the empty prompt: its tokens, in training and after it."""
    stored = read_folder(folders("sdxl"))
    write_checkpoint(tmp_path / "model", replace(stored, model_index={"force_zeros_for_empty_prompt": False}))
    config = from_checkpoint(finetune.get_config(str(tmp_path / "model")))
    model, condition = make_model(config)
    assert [len(ids) for ids in model.conditioner.null_ids] == [12, 12]
    params = {name: component.params for name, component in stored.components.items()}
    write_checkpoint(tmp_path / "export", checkpoint_of(config, model, condition, params))
    assert read_folder(tmp_path / "export").model_index["force_zeros_for_empty_prompt"] is False
    assert make_model(from_checkpoint(finetune.get_config(str(folders("sdxl")))))[0].conditioner.null_ids == ()


def test_a_section_is_the_shortest_that_gives_the_sizes():
    variants = {**unet.VARIANTS, **unet2d.VARIANTS}
    for name, sizes in variants.items():
        found = section_of(sizes, variants)
        assert sizes_of(found, variants, "") == sizes
        assert set(found) == {"variant"}, name


def task_of(folder: Path, pictures: Path):
    config = finetune.get_config(str(folder))
    config.data.source = f"folder:{pictures}"
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh)
    return from_checkpoint(config), task, task.pretrained(sharded_put(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sd2_v", "sdxl"])
def test_the_first_loss_is_that_of_diffusers_with_the_checkpoint(name, folders, pictures):
    """From images and captions on: latents to 1e-4 of the largest, the loss of the same noise to 1e-4."""
    config, task, params = task_of(folders(name), pictures)
    batch, theirs = next(task.batch(params)), folders(name)
    condition = make_model(config)[1]
    tokenizers = [condition.loaded[name] for name in condition.tokenizers]
    tokens = [np.stack([tokenizer.encode([caption])[0] for tokenizer in tokenizers]) for caption in CAPTIONS]
    order = [next(i for i, row in enumerate(tokens) if np.array_equal(row, found)) for found in batch["tokens"]]
    assert sorted(order) == [0, 1, 2, 3]
    vae = diffusers.AutoencoderKL.from_pretrained(theirs / "vae").eval()
    images = np.stack([np.asarray(Image.open(pictures / f"{i}.png")) for i in order]).astype(np.float32) / 127.5 - 1.0
    with torch.no_grad():
        moments = vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.parameters.permute(0, 2, 3, 1)
    np.testing.assert_allclose(batch["moments"], moments, atol=1e-4 * float(moments.abs().max()))
    if name == "sdxl":
        np.testing.assert_array_equal(batch["sizes"], [[16, 16, 0, 0, 16, 16]] * 4)
    told = {key: value.numpy() for key, value in texts(theirs, [CAPTIONS[i] for i in order]).items()}
    empty = {key: value.numpy()[0] for key, value in texts(theirs, [""]).items()}
    blank = {key: np.zeros_like(value) if name == "sdxl" else value for key, value in empty.items()}
    key = jax.random.key(1)
    value, _ = jax.jit(task.loss)(params, batch, key, 0)
    expected = reference_loss(config, theirs, {**batch, **told}, blank, key)
    assert float(value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "text_bert", "if_i"])
def test_an_export_before_the_first_step_is_the_checkpoint(name, folders, tmp_path):
    """Networks, scheduler, tokenizers and the type that numbers are stored in."""
    config = from_checkpoint(finetune.get_config(str(folders(name))))
    config.data.source = "openmoji"
    model, condition = make_model(config)
    params = read_pretrained(config, model, {"unet"}, set(model.configs()) - {"unet"}, lambda array, at: array)
    write_checkpoint(tmp_path / "export", checkpoint_of(config, model, condition, params), config.task.export_dtype)
    before, after = read_folder(folders(name), None), read_folder(tmp_path / "export", None)
    assert_same(before, after)
    assert after.scheduler == {"prediction_type": "epsilon", **before.scheduler}
    assert after.conditioning == before.conditioning


@pytest.mark.slow
def test_a_fine_tuned_model_is_sampled_here_and_by_diffusers(pictures, tmp_path, caplog):
    """Two steps change the UNet and nothing else; previews are of the data's captions, and the log says so."""
    small = stable_diffusion_training.get_config("sd1_tiny")
    small.model.unet.update(channels=(32,), depths=(1,), heads=(2,))
    small.model.autoencoder.channels, small.data.size = (8,), 8
    config = finetune.get_config(str(written(small, tmp_path / "before")))
    config.data.source = f"folder:{pictures}"
    config.train.update(steps=2, sample_every=2, checkpoint_every=2, log_every=1)
    config.sample.steps = 2
    with caplog.at_level("INFO", "sdjax"):
        folder = train.train_and_evaluate(config, tmp_path / "run")
    assert "samples while training: 'red heart', 'a cat', 'a photo of a red cat', ''" in caplog.text
    before, after = read_folder(tmp_path / "before"), read_folder(folder)
    for name in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, before.components[name].params, after.components[name].params)
    kernel = after.components["unet"].params["conv_in"]["kernel"]
    assert not np.array_equal(kernel, before.components["unet"].params["conv_in"]["kernel"])
    assert sdjax.load(tmp_path / "run")("a cat", steps=2).shape == (1, 8, 8, 3)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    np.testing.assert_array_equal(theirs.unet.conv_in.weight.detach().permute(2, 3, 1, 0), kernel)
