"""The LDM paper's and ADM's files: every key is used, every tensor is where it was, and wrong files are one line."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from original_names import bert_original, unet2d_original
from torch_reference import drawn

import sdjax
from sdjax.checkpoints import checkpoint
from sdjax.checkpoints.families import FAMILIES
from sdjax.checkpoints.layouts import original as original_layout
from sdjax.checkpoints.layouts.diffusers import read_folder
from sdjax.checkpoints.layouts.original import read_adm_classifier, read_single_file
from sdjax.checkpoints.layouts.original_writer import pieces_of
from sdjax.checkpoints.mapping import export
from sdjax.checkpoints.networks import unet2d
from sdjax.checkpoints.open import kind_of
from sdjax.checkpoints.original_keys import outward
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.data.text.tokenizer_training import train_word_pieces
from sdjax.diffusion_model.model import build_model
from sdjax.models.adm_classifier import ClassifierConfig
from sdjax.models.autoencoder import VARIANTS as FIRST_STAGES
from sdjax.models.bert import BertConfig
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.unet2d import VARIANTS, UNet2DConfig
from sdjax.pipeline.load import read_classifier
from sdjax.tasks.variants import sizes_of

UNET, VAE, COND = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
SMALL = {"channels": (32, 32, 64), "layers_per_block": 1, "groups": 32}
VQ = sizes_of({"variant": "vq_f4", "codes": 64, **SMALL}, FIRST_STAGES, "")
PLAIN_VQ = dataclasses.replace(VQ, mid_attention=False)
KL = sizes_of({"variant": "kl_f8", "channels": (32, 32, 32, 64), "layers_per_block": 1}, FIRST_STAGES, "")

KL_16 = dataclasses.replace(KL, latent_channels=16)


def crossed(inputs: int, heads: tuple[int, ...], width: int) -> UNetConfig:
    return UNetConfig((32, 64), (0, 1), 1, heads, width, in_channels=inputs, out_channels=inputs, layers_per_block=1)


def plain(inputs: int, outputs: int, heads: tuple[int, ...], **rest) -> UNet2DConfig:
    return UNet2DConfig((32, 64), (1,), heads, in_channels=inputs, out_channels=outputs, layers_per_block=1, **rest)


ADM = {"scale_shift": True, "resblock_updown": True}
BERT = BertConfig(vocab_size=30522, width=16, layers=2, max_length=11, head_size=4)
# family: (UNet, first stage, the network of the condition)
MODELS = {
    "celebahq": (plain(3, 3, (1, 2)), VQ, {}),
    "lsun_churches": (plain(4, 4, (8, 8), **ADM), KL, {}),
    "cin256": (crossed(3, (1, 1), 24), VQ, {"class_embedder": ClassEmbedderConfig(1001, 24)}),
    "cin_f8": (crossed(4, (1, 2), 24), KL, {"class_embedder": ClassEmbedderConfig(1000, 24)}),
    "text": (crossed(4, (8, 8), 16), KL, {"bert": BERT}),
    "text_f4": (crossed(3, (1, 2), 16), VQ, {"bert": BERT}),
    "layout": (crossed(3, (1, 2), 16), VQ, {"bert": dataclasses.replace(BERT, vocab_size=8192)}),
    "super_resolution": (plain(6, 3, (1, 2)), VQ, {}),
    "inpainting": (plain(7, 3, (8, 8), resblock_updown=True), PLAIN_VQ, {}),
    "rdm": (crossed(16, (1, 2), 24), KL_16, {}),
    "semantic": (plain(6, 3, (8, 8)), VQ, {"rescaler": RescalerConfig(182)}),
}


def tensors_of(name: str, config, params) -> dict[str, np.ndarray]:
    """A network under its original keys, without a prefix."""
    form = checkpoint.ALL_FORMATS[name]
    stored = {k: np.array(v) for k, v in export(form.table(config), params, form.shapes(config), "").items()}
    if isinstance(config, UNet2DConfig):
        return unet2d_original(stored, config, False)
    if name == "bert":
        return {f"transformer.{key}": value for key, value in bert_original(stored, config.layers).items()}
    if name in ("unet", "vae"):
        return {key: np.array(whole) for key, whole in outward(pieces_of(name, "", config), stored).items()}
    return stored


def original(name: str):
    """The tensors of a family's file with what else such files hold, and the parameters that went into it."""
    unet, vae, told = MODELS[name]
    sizes = {"unet": unet, "vae": vae, **told}
    params = {part: drawn(checkpoint.ALL_FORMATS[part].shapes(size), i) for i, (part, size) in enumerate(sizes.items())}
    tensors = {}
    for part, prefix in {"unet": UNET, "vae": VAE, **dict.fromkeys(told, COND)}.items():
        tensors |= {prefix + key: value for key, value in tensors_of(part, sizes[part], params[part]).items()}
    if name == "inpainting":  # whose condition's network is the first stage
        tensors |= {COND + key.removeprefix(VAE): v for key, v in tensors.items() if key.startswith(VAE)}
    tensors |= {"betas": np.zeros(1000, np.float32), "model_ema.decay": np.float32(0.9999), "logvar": np.zeros(9)}
    return tensors, params


def save(path, tensors):
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, None, {})
    else:
        torch.save({"state_dict": {key: torch.from_numpy(np.array(v)) for key, v in tensors.items()}}, path)
    return path


def same(found, wanted) -> None:
    for part, params in wanted.items():
        leaves = flatten(found.components[part].params)
        for key, leaf in flatten(params).items():
            np.testing.assert_array_equal(leaves[key], leaf, err_msg=f"{part} {key}")


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_file_is_where_it_was(name, tmp_path):
    """Its family, sizes, heads and scale are found; the settings are those of the release."""
    tensors, params = original(name)
    found = read_single_file(save(tmp_path / "model.ckpt", tensors))
    same(found, params)
    unet, vae, told = MODELS[name]
    sizes = {part: component.config for part, component in found.components.items()}
    assert sizes == {"unet": unet, "vae": dataclasses.replace(vae, scaling_factor=sizes["vae"].scaling_factor), **told}
    assert sizes["vae"].scaling_factor == {"text": 0.18215, "rdm": 0.22765929}.get(name, 1.0)
    assert found.components["vae"].extra["sample_size"] == (768 if name == "rdm" else 256)
    assert found.components["unet"].extra["sample_size"] == {"rdm": 96}.get(name, 64 if vae is not KL else 32)
    build_model(found, {}, jnp.float32, "")  # what the UNet takes is what the first stage and the condition give
    row = FAMILIES[name]
    assert found.conditioning == row.conditioning
    assert found.scheduler == {**row.scheduler, "prediction_type": "epsilon"}
    assert found.settings == {"size": 256, **row.settings, **({"none": 1000} if name == "cin256" else {})}


def test_ema_choice_and_file_scale(tmp_path):
    """LitEma's names; they are the default, as the paper samples with them."""
    tensors, params = original("lsun_churches")
    averages = {"model_ema." + key[6:].replace(".", ""): v + 1 for key, v in tensors.items() if key.startswith(UNET)}
    path = save(tmp_path / "model.safetensors", {**tensors, **averages, "scale_factor": np.float32(0.25)})
    same(read_single_file(path, weights="model"), params)
    found = read_single_file(path)
    leaf = found.components["unet"].params["conv_in"]["kernel"]
    np.testing.assert_array_equal(leaf, params["unet"]["conv_in"]["kernel"] + 1)
    assert found.components["vae"].config.scaling_factor == 0.25
    averages.popitem()
    path = save(tmp_path / "part.safetensors", {**tensors, **averages})
    with pytest.raises(UserError, match=r"part.safetensors has averages of \d+ of the UNet's \d+ tensors"):
        read_single_file(path)
    with pytest.raises(UserError, match="unknown weights 'mean'; choose one of: ema, model"):
        read_single_file(path, weights="mean")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_converted_folder_gives_the_same_images(suffix, tmp_path, convert, capsys):
    path = save(tmp_path / f"model{suffix}", original("cin256")[0])
    convert(path, tmp_path / "folder")
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'folder'}: a folder of a model of class_conditional"
    asked = {"class_label": 3, "steps": 2, "width": 16, "height": 8}
    pictures = [sdjax.load(source)(**asked) for source in (path, tmp_path / "folder")]
    assert pictures[0].shape == (1, 8, 16, 3)
    assert pictures[0].std() > 0.05
    np.testing.assert_array_equal(*pictures)
    with pytest.raises(UserError, match="folder: such a model is written as a new folder"):
        convert(path, tmp_path / "folder")


def test_words_need_berts_vocabulary(tmp_path, convert):
    train_word_pieces(["a red heart"] * 4, tmp_path / "words", 120)
    path = save(tmp_path / "model.ckpt", original("text")[0])
    convert(path, tmp_path / "folder", f"--tokenizer={tmp_path / 'words'}", "--dtype=float16")
    pipe = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "folder")
    assert pipe.bert.dtype == pipe.unet.dtype == torch.float32
    assert pipe.tokenizer.tokenize("a red heart") == ["a", "red", "heart"]
    checkpoint = read_folder(tmp_path / "folder")
    assert checkpoint.settings["guidance_scale"] == 5.0
    with pytest.raises(UserError, match="model has no tokenizer; give the folder"):
        sdjax.load(path)("a red heart")
    train_word_pieces(["a red heart"], tmp_path / "many", 60)
    with (tmp_path / "many" / "vocab.txt").open("a") as file:
        file.writelines(f"word{i}\n" for i in range(30522))
    for flags, message in (
        ((f"--tokenizer={tmp_path}",), r"cannot read .*vocab.txt"),
        ((f"--tokenizer={tmp_path / 'many'}",), r"has 305\d\d tokens; the model knows 30522"),
        (("--prediction=epsilon",), "--prediction epsilon is not for .*; what is: --dtype, --family, --weights"),
        (("--family=sd9",), "unknown family 'sd9'; choose one of: celebahq"),
    ):
        with pytest.raises(UserError, match=message):
            convert(path, tmp_path / "other", *flags)
    assert not (tmp_path / "other").exists()


def test_missing_keys_are_named(tmp_path):
    tensors, _ = original("semantic")
    for changed, message in (
        ({**tensors, f"{UNET}scaled_fp8": np.zeros(2)}, r"is quantised: its weights are multiplied by scales"),
        ({k: v for k, v in tensors.items() if k != f"{UNET}out.2.bias"}, "1 missing: model.diffusion_model.out.2.bias"),
        ({k: v for k, v in tensors.items() if k != f"{VAE}quant_conv.bias"}, "1 missing: first_stage_model.quant_conv"),
        ({k: v for k, v in tensors.items() if ".decoder" not in k and "post" not in k}, "lacks the first layer of"),
        (
            {**tensors, f"{UNET}input_blocks.0.0.weight": np.zeros((32, 9, 3, 3), np.float32)},
            "UNet's in_channels are 9; the",
        ),
        ({**tensors, "scale_factor": np.zeros(2)}, "scale_factor in .* is no positive number"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(read_single_file(save(tmp_path / "model.ckpt", changed)), {}, jnp.float32, "")
    small = original("super_resolution")[0]
    with pytest.raises(UserError, match=r"the UNet's in_channels are 6; the autoencoder and the condition ask for 3"):
        build_model(read_single_file(save(tmp_path / "model.ckpt", small), family="celebahq"), {}, jnp.float32, "")
    with pytest.raises(UserError, match=r"embedding\.weight, and it lacks it"):
        build_model(read_single_file(save(tmp_path / "model.ckpt", small), family="cin256"), {}, jnp.float32, "")
    others = {**original("celebahq")[0], f"{UNET}input_blocks.0.0.weight": np.zeros((32, 8, 3, 3), np.float32)}
    with pytest.raises(UserError, match="a UNet of 8 channels over latents of 3 is none of the LDM paper's"):
        read_single_file(save(tmp_path / "model.ckpt", others))


# levels, heads of each: what makes a file one of ADM's
PIXELS = {
    "adm_64": UNet2DConfig((32, 32, 64, 128), (2, 3), (1, 1, 1, 2), None, 3, 6, 3, classes=10, **ADM),
    "adm_128": UNet2DConfig((32,) * 5, (4,), (4,) * 5, out_channels=6, classes=10, **ADM),
    "adm_256": UNet2DConfig((32, 32, 32, 32, 64, 64), (4,), (1,) * 6, out_channels=6, **ADM),
    "adm_512": UNet2DConfig((32, 64, *(64,) * 5), (6,), (1,) * 7, width=64, out_channels=6, classes=10, **ADM),
}


@pytest.mark.parametrize("name", PIXELS)
def test_adms_files_become_folders(name, tmp_path, convert):
    """Bare keys; the order of the heads at 64 pixels; what diffusers has no words for is marked as ours."""
    config = PIXELS[name]
    params = drawn(unet2d.shapes(config))
    stored = {k: np.array(v) for k, v in export(unet2d.TABLE, params, unet2d.shapes(config), "").items()}
    path = tmp_path / "diffusion.pt"
    tensors = unet2d_original(stored, config, name == "adm_64")
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
    convert(path, tmp_path / "folder")
    found = read_folder(tmp_path / "folder")
    assert found.components["unet"].config == config
    for key, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found.components["unet"].params)[key], leaf, err_msg=key)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == ("PixelDiffusion" if name == "adm_512" else "DDPMPipeline")
    if name != "adm_512":
        assert diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder").unet.config.sample_size == int(name[4:])
    assert found.scheduler["beta_schedule"] == ("squaredcos_cap_v2" if name == "adm_64" else "linear")
    assert kind_of(path) == kind_of(tmp_path / "folder") == "pixels"
    assert found.conditioning == ("unconditional" if config.classes is None else "class_conditional")
    with pytest.raises(UserError, match="unknown family 'sd1'; choose one of: adm_128, adm_256, adm_512, adm_64"):
        read_single_file(path, family="sd1")
    if name == "adm_64":  # nothing of the schedule is lost between a file and a folder
        made = [sdjax.load(source)(class_label=3, steps=2) for source in (path, tmp_path / "folder")]
        np.testing.assert_array_equal(*made)


def test_a_unet_that_is_none_of_adms_is_refused(tmp_path):
    """An upsampler's six channels; another number of blocks, which a family overrides."""
    path = tmp_path / "other.pt"
    for changes, message in (
        ({"in_channels": 6}, "6 channels in and 6 out, which is none of ADM's"),
        ({"layers_per_block": 1}, "6 levels of 1 blocks"),
        ({"scale_shift": False}, "none of ADM's"),
    ):
        config = dataclasses.replace(PIXELS["adm_256"], **changes)
        params = drawn(unet2d.shapes(config))
        stored = {k: np.array(v) for k, v in export(unet2d.TABLE, params, unet2d.shapes(config), "").items()}
        tensors = unet2d_original(stored, config, False)
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
        with pytest.raises(UserError, match=message):
            read_single_file(path)
        if "in_channels" in changes:
            with pytest.raises(UserError, match="no UNet of images without cross-attention, of 3 channels in"):
                read_single_file(path, family="adm_256")
        else:
            assert read_single_file(path, family="adm_256").components["unet"].config == config


def test_sizes_that_diffusers_has_no_words_for_come_back():
    said: dict = {}
    for name in ("ldm_inpainting", "ldm_churches", "adm_128", "adm_512"):
        config = VARIANTS[name]
        said = json.loads(json.dumps(unet2d.to_config(config)))
        assert said["_class_name"] == "UNetModel"
        assert unet2d.from_config(said) == config
    for key, value in (
        ("heads", [1]),
        ("heads", [3] * 7),
        ("attention_levels", [9]),
        ("attention_levels", [[1]]),
        ("scale_shift", 1),
        ("classes", -1),
        ("channels", 3),
        ("groups", 48),
    ):
        with pytest.raises(UserError, match=key):
            unet2d.from_config({**said, key: value})


def test_adms_classifier_becomes_a_folder(tmp_path, monkeypatch, convert):
    encoder = UNet2DConfig((32, 64), (1,), (1, 1), layers_per_block=1, **ADM)
    config = ClassifierConfig(encoder, 16, 10)
    monkeypatch.setattr(original_layout, "VARIANTS", {"tiny": config})
    form = checkpoint.ALL_FORMATS["classifier"]
    params = drawn(form.shapes(config))
    stored = {k: np.array(v) for k, v in export(form.table(config), params, form.shapes(config), "").items()}
    pool = {key: stored.pop(key) for key in list(stored) if key.startswith("out.2.")}
    tensors = unet2d_original(stored, config.encoder, False)
    for kind in ("weight", "bias"):
        joint = np.concatenate([pool.pop(f"out.2.to_{letter}.{kind}") for letter in "qkv"])
        out = pool.pop(f"out.2.c_proj.{kind}")
        for name, array in (("qkv_proj", joint), ("c_proj", out)):
            tensors[f"out.2.{name}.{kind}"] = array[:, :, None] if kind == "weight" else array
    tensors |= pool
    path = tmp_path / "classifier.pt"
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
    found = read_adm_classifier(path)
    assert found.config == config
    for key, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found.params)[key], leaf, err_msg=key)
    convert(path, tmp_path / "folder")
    for source in (path, tmp_path / "folder"):
        guide = read_classifier(source)
        assert guide.config == config
        for key, leaf in flatten(params).items():
            np.testing.assert_array_equal(flatten(guide.params)[key], leaf, err_msg=key)
    extra = {**tensors, "input_blocks.9.0.weight": np.zeros(3, np.float32)}
    torch.save({key: torch.from_numpy(value) for key, value in extra.items()}, path)
    with pytest.raises(UserError, match=r"is none of ADM's classifiers \(tiny\): it has 5 blocks"):
        read_adm_classifier(path)
