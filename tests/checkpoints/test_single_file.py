"""Files in the original naming, checked against the converters of PyTorch diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, assert_same, tiny_checkpoint

from sdjax.checkpoints.checkpoint import FORMATS, Checkpoint
from sdjax.checkpoints.families import find_prediction
from sdjax.checkpoints.layouts.diffusers import pipeline_class, read_folder, write_component
from sdjax.checkpoints.layouts.original import (
    TOKENIZER_FOLDERS,
    detect,
    read_autoencoder_file,
    read_single_file,
)
from sdjax.checkpoints.layouts.original_writer import pieces_of, write_single_file
from sdjax.checkpoints.mapping import export, stored_shapes
from sdjax.checkpoints.networks import autoencoder, unet
from sdjax.checkpoints.networks.clip import VOCABULARY
from sdjax.checkpoints.original_keys import outward
from sdjax.convert import is_autoencoder_file
from sdjax.core.errors import UserError
from sdjax.models.autoencoder import VQAutoencoder, VQConfig

Tensors = dict[str, torch.Tensor]
PREDICTIONS = {"sd2": "v_prediction", "x4_upscaler": "v_prediction"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Checkpoint, Path]]:
    """Each family's tiny checkpoint, and the file that was written of it."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for family in FAMILIES:
        checkpoint = tiny_checkpoint(family, TOKENIZER_FOLDERS / "clip_l", VOCABULARY, layers=2)
        scheduler = {**checkpoint.scheduler, "prediction_type": PREDICTIONS.get(family, "epsilon")}
        checkpoint = dataclasses.replace(checkpoint, scheduler=scheduler)
        found[family] = checkpoint, folder / f"{family}.safetensors"
        write_single_file(found[family][1], checkpoint)
    return found


@pytest.fixture(scope="module")
def tensors(made) -> Mapping[str, Tensors]:
    return {family: load_file(path) for family, (_, path) in made.items()}


def in_diffusers_names(checkpoint: Checkpoint, name: str) -> dict[str, np.ndarray]:
    component, form = checkpoint.components[name], FORMATS[name]
    return export(form.table(component.config), component.params, form.shapes(component.config), name)


def converted(family: str, checkpoint: Checkpoint, name: str, file: Tensors) -> Tensors:
    """What diffusers' own converters make of a file for one network."""
    config = FORMATS[name].to_config(checkpoint.components[name].config)
    if name == "unet":
        return theirs.convert_ldm_unet_checkpoint(dict(file), config)
    if name == "vae":
        return theirs.convert_ldm_vae_checkpoint(dict(file), config)
    prefixes = {"sdxl_refiner": "conditioner.embedders.0.model.", "sdxl": "conditioner.embedders.1.model."}
    if family.startswith("sd1") or (family == "sdxl" and name == "text_encoder"):
        return theirs.convert_ldm_clip_checkpoint(dict(file))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return theirs.convert_open_clip_checkpoint(model, dict(file), prefixes.get(family, "cond_stage_model.model."))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converters_read_our_file(family: str, made, tensors):
    checkpoint, _ = made[family]
    for name in checkpoint.components:
        expected = in_diffusers_names(checkpoint, name)
        found = converted(family, checkpoint, name, tensors[family])
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key].numpy(), array, err_msg=f"{name}: {key}", strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_read(family: str, made):
    checkpoint, path = made[family]
    found = read_single_file(path)
    assert_same(checkpoint, found)
    plain = family in ("sdxl_refiner", "x4_upscaler")
    assert detect(path).family == (family if plain else family.split("_")[0])
    assert found.scheduler["prediction_type"] == checkpoint.scheduler["prediction_type"]
    assert pipeline_class(found) == pipeline_class(checkpoint)
    assert (found.low_res_scheduler is None) == (family != "x4_upscaler")
    clip_l = family.startswith("sd1") or family == "sdxl"
    folders = {} if family == "sdxl_refiner" else {"text_encoder": "clip_l" if clip_l else "open_clip"}
    folders |= {"text_encoder_2": "open_clip"} if family.startswith("sdxl") else {}
    assert found.tokenizers == {name: TOKENIZER_FOLDERS / folder for name, folder in folders.items()}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_writing_what_was_read_gives_the_same_file(family: str, made, tmp_path: Path):
    path = made[family][1]
    for name, dtype in (("again", None), ("whole", "float32")):
        write_single_file(tmp_path / f"{name}.safetensors", read_single_file(path), dtype)
        assert (tmp_path / f"{name}.safetensors").read_bytes() == path.read_bytes()


def with_what_published_files_hold(family: str, tensors: Tensors) -> Tensors:
    """Buffers, averaged weights, and what Stable Diffusion 2 leaves of its text encoder unused."""
    more = {
        name: torch.ones(1000) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "lvlb_weights", "logvar")
    }
    more |= {"log_one_minus_alphas_cumprod": torch.ones(1000), "posterior_mean_coef1": torch.ones(1000)}
    more |= {
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3),
        "scale_factor": torch.ones(()),
    }
    more |= {"model_ema.diffusion_modelinput_blocks00weight": torch.ones(3), "global_step": torch.tensor(470000)}
    more |= {"first_stage_model.loss.logvar": torch.ones(()), "denoiser.sigmas": torch.ones(1000)}
    positions = torch.arange(77)[None]
    if family.startswith("sd1"):
        more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
        more["cond_stage_model.logit_scale"] = torch.ones(())
    if family == "sdxl":
        more["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = positions
        more["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    if family.startswith("sd2"):
        stem = "cond_stage_model.model."
        layer = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{stem}transformer.resblocks.0.")}
        more |= {key.replace("resblocks.0", "resblocks.2"): tensor * 2 for key, tensor in layer.items()}
        more |= {f"{stem}text_projection": torch.ones(64, 64), f"{stem}logit_scale": torch.ones(())}
        more |= {f"{stem}attn_mask": torch.ones(77, 77), "depth_model.model.scratch.weight": torch.ones(2)}
    return {**tensors, **more}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2_depth", "sdxl", "sdxl_refiner"])
def test_what_else_published_files_hold_is_passed_over(family: str, made, tensors, tmp_path: Path):
    path = tmp_path / "full.safetensors"
    save_file(with_what_published_files_hold(family, tensors[family]), path)
    prediction = made[family][0].scheduler["prediction_type"]
    assert_same(made[family][0], read_single_file(path, prediction=prediction))


def test_older_spellings_are_read(made, tensors, tmp_path: Path):
    """Text encoders before the inner name, attention matrices of the autoencoder without the axes of a convolution."""
    file = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in tensors["sd1"].items()}
    squeezed = {key: tensor[:, :, 0, 0] for key, tensor in file.items() if "attn_1" in key and tensor.ndim == 4}
    assert len(squeezed) == 8
    save_file({key: tensor.contiguous() for key, tensor in (file | squeezed).items()}, tmp_path / "old.safetensors")
    assert_same(made["sd1"][0], read_single_file(tmp_path / "old.safetensors"))


@pytest.mark.parametrize("requested", [None, "its own"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2_depth"])
def test_names_of_ldms_successor(family: str, requested: str | None, made, tensors, tmp_path: Path):
    """As sd_turbo: a prefix of Stable Diffusion 2's text encoder and the refiner's, whose UNet takes a vector."""
    stem = "cond_stage_model."
    file = {k.replace(stem, "conditioner.embedders.0."): tensor for k, tensor in tensors[family].items()}
    assert len(file.keys() - tensors[family].keys()) > 20
    save_file(file, tmp_path / "sgm.safetensors")
    found = read_single_file(tmp_path / "sgm.safetensors", family=requested and family.split("_")[0])
    assert_same(made[family][0], found)
    assert found.components["vae"].config.scaling_factor == 0.18215
    assert found.tokenizers == {"text_encoder": TOKENIZER_FOLDERS / ("clip_l" if family == "sd1" else "open_clip")}


def test_networks_of_two_families_are_no_checkpoint(tensors, tmp_path: Path):
    """Else Stable Diffusion 2 would be sampled with the heads and the activation of the first."""
    text = {key: tensor for key, tensor in tensors["sd1"].items() if key.startswith("cond_stage_model.")}
    rest = {key: tensor for key, tensor in tensors["sd2"].items() if not key.startswith("cond_stage_model.")}
    save_file({**text, **rest}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="under the name of Stable Diffusion 1's, and a UNet of another family"):
        detect(tmp_path / "x.safetensors")


def test_latent_consistency_models(tensors, tmp_path: Path):
    """Whose UNet is conditioned on the guidance scale, under LDM's spelling and under that of diffusers' script."""
    made = tiny_checkpoint("sd1_lcm", TOKENIZER_FOLDERS / "clip_l", VOCABULARY)
    write_single_file(tmp_path / "lcm.safetensors", made)
    assert_same(made, read_single_file(tmp_path / "lcm.safetensors"))
    file = load_file(tmp_path / "lcm.safetensors")
    stem = "model.diffusion_model"
    file[f"{stem}.time_embedding.cond_proj.weight"] = file.pop(f"{stem}.time_embed.cond_proj.weight")
    save_file(file, tmp_path / "other.safetensors")
    assert_same(made, read_single_file(tmp_path / "other.safetensors"))


def test_pickles_are_read_as_well(made, tensors, tmp_path: Path):
    torch.save({"state_dict": tensors["sd2"], "global_step": 875000}, tmp_path / "model.ckpt")
    assert_same(made["sd2"][0], read_single_file(tmp_path / "model.ckpt"))
    assert detect(tmp_path / "model.ckpt").prediction == "epsilon"


@pytest.mark.parametrize(
    ("family", "metadata", "marks", "asked", "prediction"),
    [
        ("sd1", {}, (), None, "epsilon"),
        ("sd1", {"modelspec.prediction_type": "v"}, (), None, "v_prediction"),
        ("sd1", {"modelspec.prediction_type": "v"}, (), "epsilon", "epsilon"),
        ("sd2", {}, (), None, "v_prediction"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), None, "epsilon"),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, (), None, "epsilon"),
        ("sd2_depth", {}, (), None, "epsilon"),
        ("sdxl", {}, (), None, "epsilon"),
        ("sdxl", {}, ("v_pred",), None, "v_prediction"),
        ("sdxl", {}, ("v_pred", "ztsnr"), None, "v_prediction"),
        ("sdxl", {}, (), "v", "v_prediction"),
        ("x4_upscaler", {}, (), None, "v_prediction"),
    ],
)
def test_what_the_network_predicts(family, metadata, marks, asked, prediction, tensors, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({**tensors[family], **{mark: torch.zeros(0) for mark in marks}}, path, metadata)
    found = detect(path, prediction=asked)
    assert found.prediction == prediction
    assert prediction in str(found)
    if marks or asked:
        scheduler = read_single_file(path, prediction=asked).scheduler
        assert scheduler["prediction_type"] == prediction
        assert scheduler.get("rescale_betas_zero_snr", False) is ("ztsnr" in marks)
        assert scheduler.get("timestep_spacing", "leading") == ("trailing" if "ztsnr" in marks else "leading")


@pytest.mark.parametrize(("spread", "prediction"), [(0.02, "epsilon"), (0.2, "v_prediction")])
def test_a_spread_tells_what_stable_diffusion_2_predicts(spread: float, prediction: str):
    """Of one norm's bias, as ComfyUI tells it; facts of the file come first."""
    bias = np.random.default_rng(0).normal(0.0, spread, 320).astype(np.float16)
    stored = {"model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": bias}
    assert find_prediction("sd2", stored, {}, 4)[0] == prediction
    assert find_prediction("sd2", stored, {"global_step": "875000"}, 4)[0] == "epsilon"
    assert find_prediction("sd2", stored, {}, 9)[0] == "epsilon"
    assert find_prediction("sdxl", stored, {}, 4)[0] == "epsilon"


LDM_YAML = "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {timesteps: 1000%s}}"
SGM_YAML = (
    "model: {target: sgm.models.diffusion.DiffusionEngine, params: {scale_factor: 0.13025, denoiser_config: "
    "{params: {scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.%s}}}}}"
)


@pytest.mark.parametrize(
    ("family", "content", "prediction"),
    [
        ("sd1", LDM_YAML % ", parameterization: v", "v_prediction"),
        ("sd1", LDM_YAML % ", parameterization: x0", "sample"),
        ("sd2", LDM_YAML % ", parameterization: v", "v_prediction"),
        ("sd2", LDM_YAML % "", "epsilon"),
        ("sdxl", SGM_YAML % "VScaling", "v_prediction"),
        ("sdxl", SGM_YAML % "EpsScaling", "epsilon"),
        ("sdxl", "training: {steps: 3}", "epsilon"),
    ],
)
def test_a_config_beside_a_file_is_followed(family, content, prediction, tensors, tmp_path: Path):
    """By its name, as A1111 does; it wins over the file's metadata, and what is requested wins over it."""
    path, other = tmp_path / "model.safetensors", {"epsilon": "v", "v_prediction": "epsilon", "sample": "v"}
    beside = content.startswith("model")
    save_file(tensors[family], path, {"modelspec.prediction_type": other[prediction] if beside else prediction})
    (tmp_path / "model.yaml").write_text(content)
    found = read_single_file(path)
    assert found.scheduler["prediction_type"] == prediction
    assert ("model.yaml says so" in str(detect(path))) == beside
    for requested, expected in (("epsilon", "epsilon"), ("v", "v_prediction")):
        assert detect(path, prediction=requested).prediction == expected
    assert found.components["vae"].config.scaling_factor == (0.13025 if family == "sdxl" else 0.18215)


def test_a_configs_noise_schedule_and_scale(tensors, tmp_path: Path):
    save_file(tensors["sd1"], tmp_path / "model.safetensors")
    said = ", linear_start: 0.0015, linear_end: 0.0195, beta_schedule: cosine, scale_factor: 0.3, use_ema: false"
    (tmp_path / "model.yaml").write_text(LDM_YAML % said)
    found = read_single_file(tmp_path / "model.safetensors")
    schedule = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "squaredcos_cap_v2"}
    assert schedule.items() <= found.scheduler.items()
    assert found.components["vae"].config.scaling_factor == 0.3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: {", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        (LDM_YAML % ", parameterization: velocity", "unknown parameterization 'velocity' in .*; choose one of: eps, v"),
        (LDM_YAML % ", parameterization: [v]", r"unknown parameterization \['v'\]"),
        (LDM_YAML % ", beta_schedule: sqrt", "unknown beta_schedule 'sqrt'"),
        (LDM_YAML % ", linear_end: none", "linear_end = 'none' in .* is no positive number"),
        (LDM_YAML % ", scale_factor: -1", "scale_factor = -1 in .* is no positive number"),
        (SGM_YAML % "EDMScaling", "unknown scaling_config 'EDMScaling'"),
    ],
)
def test_a_config_that_cannot_be_followed_is_named(content: str, words: str, tensors, tmp_path: Path):
    save_file(tensors["sd1"], tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        detect(tmp_path / "model.safetensors")
    assert "model.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_of_x0_is_followed(tensors, tmp_path: Path):
    """SDXL-Lightning's models of one step, whose files say it nowhere else."""
    for name in ("sdxl_lightning_1step_x0", "sdxl_lightning_1step_unet_x0"):
        save_file(tensors["sdxl"], tmp_path / f"{name}.safetensors", {"modelspec.prediction_type": "epsilon"})
        assert detect(tmp_path / f"{name}.safetensors").prediction == "sample"
    assert detect(tmp_path / f"{name}.safetensors", prediction="v").prediction == "v_prediction"


def test_a_terminal_snr_of_zero_survives_the_round_trip(made, tmp_path: Path):
    checkpoint, _ = made["sdxl"]
    scheduler = {**checkpoint.scheduler, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write_single_file(tmp_path / "z.safetensors", dataclasses.replace(checkpoint, scheduler=scheduler))
    found = read_single_file(tmp_path / "z.safetensors").scheduler
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)


@pytest.mark.parametrize("form", ["first_stage_model.", "vae.", ""])
def test_an_autoencoder_alone(form: str, made, tensors, tmp_path: Path):
    stem, path = "first_stage_model.", tmp_path / "vae.safetensors"
    file = {form + key.removeprefix(stem): t for key, t in tensors["sdxl"].items() if key.startswith(stem)}
    save_file({**file, "loss.logvar": torch.ones(()), "model_ema.decay": torch.ones(())}, path)
    assert is_autoencoder_file(path)
    assert not is_autoencoder_file(made["sdxl"][1])
    component = read_autoencoder_file(path, family="sdxl")
    checkpoint = made["sdxl"][0]
    assert_same(checkpoint, checkpoint.replace_component("vae", component))
    assert read_autoencoder_file(path).config.scaling_factor == 0.18215
    with pytest.raises(UserError, match="no checkpoint of a family"):
        read_single_file(path)


def test_missing_and_unexpected_keys_are_both_listed(tensors, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    file = dict(tensors["sdxl"])
    del file["first_stage_model.decoder.conv_out.bias"], file["conditioner.embedders.1.model.ln_final.weight"]
    file["model.diffusion_model.adapter.weight"] = torch.ones(1)
    file["model.diffusion_model.out.0.bias"] = torch.ones(65)
    save_file(file, path)
    with pytest.raises(UserError) as error:
        read_single_file(path)
    missing, unexpected, wrong = str(error.value).splitlines()[1:]
    assert "2 missing" in missing
    assert "first_stage_model.decoder.conv_out.bias" in missing
    assert "conditioner.embedders.1.model.ln_final.weight" in missing
    assert "1 unexpected: model.diffusion_model.adapter.weight" in unexpected
    assert "of another shape: model.diffusion_model.out.0.bias (65, not 64)" in wrong


@pytest.mark.parametrize(
    "strays",
    [
        ("model.diffusion_model.adapter.weight",),
        ("cond_stage_model.merge_recipe",),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha",),
        ("emb_params", "text_model.final_layer_norm.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ],
)
def test_what_a_merge_left_is_said(strays: tuple[str, ...], made, tensors, tmp_path: Path, caplog):
    path = tmp_path / "merge.safetensors"
    save_file({**tensors["sd1"], **{key: torch.ones(2) for key in strays}}, path)
    with caplog.at_level("WARNING", "sdjax"):
        assert_same(made["sd1"][0], read_single_file(path))
    belong = "a tensor that belongs" if len(strays) == 1 else f"{len(strays)} tensors that belong"
    left = ", ".join(sorted(strays))
    assert caplog.messages == [f"merge.safetensors holds {belong} to none of its networks, left out: {left}"]


@pytest.mark.parametrize(
    "scale",
    [
        "scaled_fp8",
        "model.diffusion_model.scaled_fp8",
        "model.diffusion_model.input_blocks.1.1.proj_in.scale_weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight_scale",
        "model.diffusion_model.input_blocks.1.1.proj_in.comfy_quant",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight.absmax",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_scales_are_not_passed_over(scale: str, tensors, tmp_path: Path):
    """Of weights in 8 or 4 bits: without them the file would be read, and its images be noise."""
    save_file({**tensors["sd1"], scale: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"is quantised: its weights are multiplied by scales \({scale}\)"):
        read_single_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("edm_mean", "Playground"),
        ("embedder.model.visual.proj", "unCLIP"),
        ("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight", "Stable Video Diffusion"),
    ],
)
def test_whole_models_of_other_families_are_named(key: str, words: str, tensors, tmp_path: Path):
    """What is added to Stable Diffusion's own networks makes another model of them."""
    save_file({**tensors["sd1"], key: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"it looks like .*{words}"):
        read_single_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("transformer.x.lora_A.weight", "a LoRA"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("emb_params", "a textual-inversion embedding"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias", "AnimateDiff"),
        ("first_stage_model.quantize.embedding.weight", "vector-quantised"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet of a diffusers folder"),
        ("something.weight", "lacks a UNet"),
    ],
)
def test_other_families_are_named(key: str, words: str, tmp_path: Path):
    save_file({key: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words) as error:
        read_single_file(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_structures_that_are_not_here_are_refused(tensors, tmp_path: Path):
    stem, path = "model.diffusion_model.", tmp_path / "x.safetensors"
    file = tensors["sd1"]
    pix2pix = file | {f"{stem}input_blocks.0.0.weight": torch.ones(64, 8, 3, 3)}
    pruned = {key: t for key, t in file.items() if not key.startswith(f"{stem}input_blocks.2.1.")}
    headless = {key: t for key, t in file.items() if not key.startswith(f"{stem}middle_block.1.")}
    other = file | {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(1000, 64)}
    textless = {key: t for key, t in file.items() if not key.startswith("cond_stage_model.")}
    for content, words in (
        (pix2pix, "8 input channels"),
        (pruned, "unlike blocks"),
        (headless, "in the middle"),
        (other, "a text encoder of 1000 tokens"),
        (textless, "a UNet, but no text encoder"),
    ):
        save_file(content, path)
        with pytest.raises(UserError, match=words):
            read_single_file(path)
    with pytest.raises(UserError, match=r"unknown family 'sd4'.*sd1, sd2, sdxl"):
        read_single_file(path, family="sd4")
    save_file(file, path)
    with pytest.raises(UserError, match="unknown prediction 'w'"):
        read_single_file(path, prediction="w")
    with pytest.raises(UserError, match="none of the files"):
        read_single_file(path.with_suffix(".gguf"))


def test_what_the_layout_cannot_say_is_not_written(made, tmp_path: Path):
    checkpoint, _ = made["sd1"]
    part = checkpoint.components["unet"]
    config = dataclasses.replace(part.config, heads=(4, 4))
    other = checkpoint.replace_component("unet", dataclasses.replace(part, config=config))
    with pytest.raises(UserError, match=r"cannot say of the unet: heads \(4, 4\) \(not \(8, 8\)\)"):
        write_single_file(tmp_path / "x.safetensors", other)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError):
        write_single_file(tmp_path / "mine.safetensors", checkpoint)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    assert unet.from_diffusers_config({}).heads == (8, 8, 8, 8), "the family's own"


def test_channels_not_divisible_by_32(tmp_path):
    """In the shipped model, which has 8; diffusers' layout says how many there are."""
    checkpoint = read_folder(Path(__file__).parents[2] / "checkpoints" / "openmoji")
    with pytest.raises(UserError, match=r"norm_num_groups = 32 in .* must be a divisor of each of \[8, 16, 32, 64\]"):
        write_single_file(tmp_path / "file.safetensors", checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_first_stage_with_a_codebook_and_its_critics(tmp_path: Path):
    """LDM's `model.ckpt` of a VQ autoencoder: what trained it is left out; diffusers' VQModel decodes the same."""
    config = VQConfig((32, 32), 3, 1, 32, codes=20, attention_levels=(1,))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype("f"), autoencoder.shapes(config))
    keys = stored_shapes(autoencoder.TABLE, autoencoder.shapes(config))
    pieces = pieces_of("vae", "", config)
    assert pieces.keys() == keys.keys()
    state = {k: np.array(v) for k, v in outward(pieces, export(autoencoder.TABLE, params, params, "")).items()}
    state = {key: torch.from_numpy(value) for key, value in state.items()}
    state |= {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    state |= {"loss.discriminator.main.3.num_batches_tracked": torch.tensor(7)}
    state |= {"loss.perceptual_loss.net.slice1.0.weight": torch.zeros(4, 3, 3, 3)}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    assert is_autoencoder_file(tmp_path / "model.ckpt")
    component = read_autoencoder_file(tmp_path / "model.ckpt")
    assert component.config == dataclasses.replace(config, scaling_factor=1.0)
    write_component(tmp_path / "vae", "vae", component)
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "vae").eval()
    z = rng.standard_normal((1, 4, 4, 3)).astype("f")
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(z).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
    found = VQAutoencoder(config).apply({"params": component.params}, z, method="decode")
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
