"""What is opened is found out once, whatever it holds; patches change a checkpoint and leave the rest."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from original_names import unet2d_original
from safetensors.numpy import load_file, save_file
from test_ldm_file import PIXELS, original, save
from tiny_checkpoints import assert_same, random_params, tiny_checkpoint, write_tokenizer
from torch_reference import drawn

import sdjax
from sdjax.checkpoints.checkpoint import Component, tokenizers_of
from sdjax.checkpoints.embeddings import add_embeddings
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.checkpoints.mapping import export
from sdjax.checkpoints.networks import autoencoder, unet2d
from sdjax.checkpoints.open import read_checkpoint, replace_vae, resolve
from sdjax.checkpoints.storage import safetensors, weights
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten


def pixel_tensors():
    config = PIXELS["adm_256"]
    params = drawn(unet2d.shapes(config))
    stored = {k: np.array(v) for k, v in export(unet2d.TABLE, params, unet2d.shapes(config), "").items()}
    return unet2d_original(stored, config, False)


@pytest.mark.parametrize("conditioning", ["super_resolution", "unconditional", "text"])
def test_a_pickle_is_loaded_once(conditioning, tmp_path, monkeypatch):
    path, loads = tmp_path / "model.ckpt", []
    if conditioning == "text":
        checkpoint = tiny_checkpoint("sd1", TOKENIZER_FOLDERS / "clip_l", 49408)
        write_single_file(tmp_path / "model.safetensors", checkpoint)
        tensors = weights.read_file(tmp_path / "model.safetensors").tensors
    else:
        tensors = pixel_tensors() if conditioning == "unconditional" else original(conditioning)[0]
    save(path, tensors)
    load = weights.load_pickle
    monkeypatch.setattr(weights, "load_pickle", lambda path: loads.append(path) or load(path))
    assert read_checkpoint(path).conditioning == conditioning
    assert len(loads) == 1


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_a_header_is_read_once(name, tmp_path, monkeypatch):
    """Of each file of a folder, and of a single file."""
    checkpoint = tiny_checkpoint("sd1", TOKENIZER_FOLDERS / "clip_l", 49408)
    (write_single_file if name.endswith("s") else write_checkpoint)(tmp_path / name, checkpoint)
    read, header = Counter(), safetensors._header
    monkeypatch.setattr(safetensors, "_header", lambda path: read.update([path]) or header(path))
    found = read_checkpoint(tmp_path / name)
    assert len(read) == (1 if name.endswith("s") else len(found.components))
    assert set(read.values()) == {1}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    tokenizer = tmp_path_factory.mktemp("source") / "tokenizer"
    return tiny_checkpoint("sdxl", tokenizer, write_tokenizer(tokenizer))


def test_choices_that_are_not_for_what_is_opened(sdxl, tmp_path):
    write_checkpoint(tmp_path / "model", sdxl)
    assert_same(sdxl, read_checkpoint(tmp_path / "model"))
    assert read_checkpoint(tmp_path / "model", prediction="v").scheduler["prediction_type"] == "v_prediction"
    for choices, message in (
        ({"family": "sdxl"}, "family 'sdxl': .* is a folder, whose configs say what it is; leave it out"),
        ({"weights": "ema"}, "weights 'ema': .* is a folder"),
        ({"prediction": "w"}, "unknown prediction 'w'"),
        ({"tokenizer": tmp_path}, "a model of text has a tokenizer of its own"),
    ):
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / "model", **choices)


def test_a_write_that_fails_leaves_no_folder(tmp_path):
    """Of a model of the LDM paper; also a folder of someone else's is left alone."""
    found = read_checkpoint(save(tmp_path / "model.ckpt", original("super_resolution")[0]))
    vae = found.components["vae"]
    params = {**vae.params, "quant_conv": {"kernel": np.full((1, 1, 3, 3), np.inf), "bias": np.zeros(3)}}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="not finite"):
        write_checkpoint(tmp_path / "out", found.replace_component("vae", dataclasses.replace(vae, params=params)))
    with pytest.raises(UserError, match="was not written by sdjax"):
        write_checkpoint(tmp_path, found)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("conditioning", ["super_resolution", "unconditional"])
def test_own_folders_of_every_kind_are_written_over(conditioning, tmp_path):
    """By the index's `_writer`; a folder of before that lacks it is read still, and left alone."""
    tensors = pixel_tensors() if conditioning == "unconditional" else original(conditioning)[0]
    found, folder = read_checkpoint(save(tmp_path / "model.ckpt", tensors)), tmp_path / "out"
    write_checkpoint(folder, found)
    (folder / "README.md").write_text("a card")
    write_checkpoint(folder, found)
    assert (folder / "README.md").read_text() == "a card"
    index = json.loads((folder / "model_index.json").read_text())
    del index["_writer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert_same(found, read_checkpoint(folder))
    with pytest.raises(UserError, match="was not written by sdjax"):
        write_checkpoint(folder, found)


def embedding(path, count, seed):
    rng = np.random.default_rng(seed)
    save_file({name: rng.standard_normal((count, 64), np.float32) for name in ("clip_l", "clip_g")}, path)
    return path


def test_words_are_added_one_after_another(sdxl, tmp_path):
    """Two patches do what one of both words does: the ids of a word are the rows of its vectors, in both encoders."""
    first, second = (embedding(tmp_path / f"{n}.safetensors", i, i) for i, n in enumerate(("toy", "style"), 2))
    both, one = add_embeddings([first, second])(sdxl), add_embeddings([first])(sdxl)
    again = add_embeddings([second])(one)
    assert_same(both, again)
    for name, tokenizer, repeated in zip(sdxl.tokenizers, tokenizers_of(both), tokenizers_of(again), strict=True):
        size = sdxl.components[name].config.vocab_size
        assert both.components[name].config.vocab_size == size + 5
        ids = tokenizer.encode(["a toy of style"])
        np.testing.assert_array_equal(ids, repeated.encode(["a toy of style"]))
        assert [i - size for i in ids[0] if i >= size] == [0, 1, 2, 3, 4]
        rows = flatten(both.components[name].params)["token_embedding/embedding"][size:]
        wanted = [weights.read_file(file).tensors for file in (first, second)]
        part = "clip_l" if name == "text_encoder" else "clip_g"
        np.testing.assert_array_equal(rows, np.concatenate([np.asarray(file[part]) for file in wanted]))
    with pytest.raises(UserError, match="there are two textual inversions for the word 'toy'"):
        add_embeddings([first])(one)


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_words_that_were_added_are_written(form, sdxl, tmp_path):
    """Into both tokenizers, whichever files they have: of the copy they are the same ids, here and in transformers."""
    folder = next(iter(sdxl.tokenizers.values()))
    if form == "tokenizer.json":
        transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer")
        folder = tmp_path / "tokenizer"
    base = dataclasses.replace(sdxl, tokenizers=dict.fromkeys(sdxl.tokenizers, folder))
    first, second = (embedding(tmp_path / f"{n}.safetensors", i, i) for i, n in enumerate(("toy", "style"), 2))
    added = add_embeddings([first])(base)
    write_checkpoint(tmp_path / "copy", added)
    found = read_checkpoint(tmp_path / "copy")
    assert_same(added, found)
    size = sdxl.components["text_encoder"].config.vocab_size
    for part, ours, theirs in zip(
        ("tokenizer", "tokenizer_2"), tokenizers_of(added), tokenizers_of(found), strict=True
    ):
        ids = ours.encode(["a toy of red"])
        np.testing.assert_array_equal(theirs.encode(["a toy of red"]), ids)
        continued = transformers.CLIPTokenizer.from_pretrained(tmp_path / "copy" / part)("a toy toy_1 of red").input_ids
        assert continued == list(ids[0, : len(continued)])
        assert continued[2:4] == [size, size + 1]
    again = add_embeddings([second])(found)
    assert tokenizers_of(again)[1].encode(["toy style"])[0, 1:6].tolist() == list(range(size, size + 5))
    with pytest.raises(UserError, match="there are two textual inversions for the word 'toy'"):
        tokenizers_of(add_embeddings([first])(found))


def test_words_in_pickles(tmp_path):
    """A1111's layout, whose vectors are a mapping within the file's, also as the module that it was at first."""
    base = tiny_checkpoint("sd1", tmp_path / "tokenizer", write_tokenizer(tmp_path / "tokenizer"))
    size = base.components["text_encoder"].config.vocab_size
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    for name, kind in (("easy", dict), ("old", torch.nn.ParameterDict)):
        stored = {"string_to_token": {"*": 265}, "string_to_param": kind({"*": vectors}), "name": name, "step": 9}
        torch.save(stored, tmp_path / f"{name}.pt")
        found = add_embeddings([tmp_path / f"{name}.pt"])(base)
        rows = flatten(found.components["text_encoder"].params)["token_embedding/embedding"][size:]
        np.testing.assert_array_equal(rows, vectors)
        assert list(tokenizers_of(found)[0].encode([f"a {name}"])[0, 2:4]) == [size, size + 1]


def test_another_autoencoder_leaves_the_rest(sdxl, tmp_path):
    """Of a folder, of the network's own folder, of its file with config.json beside it, or of a whole single file."""
    write_checkpoint(tmp_path / "model", sdxl)
    write_single_file(tmp_path / "model.safetensors", tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408))
    vae = sdxl.components["vae"]
    halved = {**vae.params, "quant_conv": {k: v / 2 for k, v in vae.params["quant_conv"].items()}}
    other = sdxl.replace_component("vae", dataclasses.replace(vae, params=halved))
    alone = tmp_path / "model" / "vae"
    for source in ("model", alone, alone / "diffusion_pytorch_model.safetensors", "model.safetensors"):
        assert_same(sdxl, replace_vae(tmp_path / source)(other))
    unet = Component(PIXELS["adm_256"], {})
    pixels = dataclasses.replace(sdxl, components={"unet": unet}, conditioning="unconditional")
    with pytest.raises(UserError, match="the model diffuses pixels"):
        replace_vae(tmp_path / "model")(pixels)
    (alone / "config.json").unlink()
    with pytest.raises(UserError, match=r"in diffusers' naming; its config\.json is not beside it"):
        replace_vae(alone / "diffusion_pytorch_model.safetensors")(other)


def test_autoencoders_of_other_families_are_refused(sdxl, tmp_path):
    """Stable Diffusion 1's and XL's have the same sizes; a scale tells them apart, where something says it."""
    first = tiny_checkpoint("sd1", TOKENIZER_FOLDERS / "clip_l", 49408)
    write_component(tmp_path / "vae", "vae", first.components["vae"])
    write_single_file(tmp_path / "sd1.safetensors", first)
    for source in ("vae", "sd1.safetensors"):
        with pytest.raises(UserError, match=r"of another family: its latents are scaled by 0\.18215, .* by 0\.13025"):
            replace_vae(tmp_path / source)(sdxl)
        assert_same(first, replace_vae(tmp_path / source)(first))
    part = first.components["vae"]
    config = dataclasses.replace(part.config, channels=(32, 32, 64))
    write_component(tmp_path / "deep", "vae", Component(config, random_params(autoencoder.shapes(config), 0)))
    with pytest.raises(UserError, match="latents of 4 channels at 1/4 of a side, the model's own of 4 channels at 1/2"):
        replace_vae(tmp_path / "deep")(first)
    # Of one family, but measured on other images: the model's own scale stays.
    write_component(tmp_path / "near", "vae", dataclasses.replace(part, config=replace_scale(part.config, 0.1815)))
    assert replace_vae(tmp_path / "near")(first).components["vae"].config.scaling_factor == 0.18215


def replace_scale(config, scale):
    return dataclasses.replace(config, scaling_factor=scale)


def test_checkpoints_without_autoencoder(tmp_path):
    """They are read where another source brings one; its file alone lacks the scale, which the family says."""
    whole = tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408)
    write_single_file(tmp_path / "whole.safetensors", whole)
    tensors, stem = load_file(tmp_path / "whole.safetensors"), "first_stage_model."
    save_file({k: t for k, t in tensors.items() if not k.startswith(stem)}, tmp_path / "model.safetensors")
    vae = {k.removeprefix(stem): t for k, t in tensors.items() if k.startswith(stem)}
    save_file(vae, tmp_path / "vae.safetensors")
    write_checkpoint(tmp_path / "folder", whole)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    for source, words in (("model.safetensors", "lacks an autoencoder"), ("folder", "lists no vae")):
        with pytest.raises(UserError, match=words):
            read_checkpoint(tmp_path / source)
        found = read_checkpoint(tmp_path / source, optional=("vae",))
        assert "vae" not in found.components
        found = replace_vae(tmp_path / "vae.safetensors")(found)
        order = {name: found.components[name] for name in whole.components}
        assert_same(whole, dataclasses.replace(found, components=order))


def test_a_checkpoint_and_its_autoencoder_are_loaded(tmp_path):
    whole = tiny_checkpoint("sd1", TOKENIZER_FOLDERS / "clip_l", 49408)
    write_single_file(tmp_path / "whole.safetensors", whole)
    tensors = load_file(tmp_path / "whole.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if not k.startswith("first_stage_model.")}, tmp_path / "model.safetensors"
    )
    pipe = sdjax.load(tmp_path / "model.safetensors", vae=tmp_path / "whole.safetensors")
    assert (pipe.model.scale, pipe.model.factor) == (0.18215, 2)
    np.testing.assert_array_equal(
        pipe.params["vae"]["quant_conv"]["kernel"], whole.components["vae"].params["quant_conv"]["kernel"]
    )
    with pytest.raises(UserError, match="lacks an autoencoder; sampling takes another one, --vae"):
        sdjax.load(tmp_path / "model.safetensors")


def test_a_workdir_means_its_export(sdxl, tmp_path):
    """A whole model's and a first stage's, which has no index; a folder of diffusers is itself, whatever lies in it."""
    write_component(tmp_path / "stage/export/vae", "vae", sdxl.components["vae"])
    write_checkpoint(tmp_path / "run/export", sdxl)
    write_checkpoint(tmp_path / "model", sdxl)
    (tmp_path / "model/export").mkdir()
    found = {name: resolve(tmp_path / name) for name in ("stage", "run", "model")}
    assert found == {"stage": tmp_path / "stage/export", "run": tmp_path / "run/export", "model": tmp_path / "model"}
    assert_same(replace_vae(tmp_path / "stage")(sdxl), sdxl)
