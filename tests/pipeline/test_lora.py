"""LoRAs in whole pipelines against PyTorch diffusers and peft: |difference| of images below 1e-3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_against_diffusers import to_torch

import sdjax
from sdjax.checkpoints.lora.reading import hash_of
from sdjax.cli.records import parameters
from sdjax.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

TOLERANCE = 1e-3
PROMPTS = ["red heart", "a painting of a dog"]
HOW = {"guidance_scale": 5.0}
STEPS = 3
PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def layers_of(pipe) -> dict[str, torch.nn.Module]:
    """The layers that kohya's default and convolutional targets name, by diffusers' names."""
    parts = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    targets = {"unet": TARGETS, "text_encoder": TEXT_TARGETS, "text_encoder_2": TEXT_TARGETS}
    return {
        f"{part}.{name}": module
        for part, network in parts.items()
        if network is not None
        for name, module in network.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets[part])
        and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def kohya(pipe, seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """A file's tensors in kohya's naming, with alphas that are not the rank."""
    draw = torch.Generator().manual_seed(seed)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if getattr(pipe, "text_encoder_2", None) is not None:
        prefixes["text_encoder"] = "lora_te1"
    tensors = {}
    for i, (name, module) in enumerate(layers_of(pipe).items()):
        part, _, path = name.partition(".")
        path = path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}"
        stem, shape = f"{prefixes[part]}_{path.replace('.', '_')}", module.weight.shape
        own = rank + i % 2
        ones = [1] * (len(shape) - 2)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(own, *shape[1:], generator=draw) / shape[1:].numel() ** 0.5
        tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], own, *ones, generator=draw) * 0.3
        tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    return tensors


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory, in_diffusers):
    """lora_files(family, seed): a file in kohya's naming."""
    folder, made = tmp_path_factory.mktemp("loras"), {}

    def write(family: str, seed: int = 0):
        path = folder / f"{family}_{seed}.safetensors"
        if path not in made:
            save_file(kohya(in_diffusers(PIPELINES[family], family), seed), path)
            made[path] = True
        return path

    return write


@pytest.fixture
def with_loras(in_diffusers, monkeypatch):
    """with_loras(family, files, weights): diffusers' images with LoRAs, which are taken out again."""
    # The newest peft of PyPI is older than what transformers asks for, and does all the same.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *args, **options: None)

    def images(family: str, files, weights, noise: np.ndarray, later=None) -> np.ndarray:
        """`later` are the weights from the second step on."""
        pipe = in_diffusers(PIPELINES[family], family)
        names = [f"lora{i}" for i in range(len(files))]

        def change(pipe, step, timestep, values):
            if later is not None:
                pipe.set_adapters(names, later)
            return values

        try:
            for name, file in zip(names, files, strict=True):
                pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
            pipe.set_adapters(names, weights)
            size = {"width": zoo.SIDE, "height": zoo.SIDE, "callback_on_step_end": change}
            given = {"num_inference_steps": STEPS, "latents": to_torch(noise), "output_type": "np", **size, **HOW}
            return pipe(PROMPTS, **given).images
        finally:
            pipe.unload_lora_weights()

    return images


@pytest.fixture
def how(noise):
    return {"steps": STEPS, "latents": noise, "width": zoo.SIDE, "height": zoo.SIDE, **HOW}


def check(ours, theirs, base):
    assert np.abs(theirs - base).max() > 0.05, "the LoRA changes nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_strengths(family, opened, folders, lora_files, with_loras, noise, how, compilations):
    """At 0.5, 1 and 1.3 and two stacked; strengths compile nothing, and 0 is the base to the bit."""
    files = [lora_files(family, 0), lora_files(family, 1)]
    pipe = sdjax.load(folders(family), lora=[f"{files[0]}:0.5", files[1]])
    base = pipe(PROMPTS, lora_scale=0, **how)
    np.testing.assert_array_equal(base, opened(family)(PROMPTS, **how))
    pipe(PROMPTS, **how)
    compilations.clear()
    for scale in (0.5, 1.0, 1.3):
        check(pipe(PROMPTS, lora_scale=[scale, 0], **how), with_loras(family, files[:1], [scale], noise), base)
    both = with_loras(family, files, [0.5, 1.0], noise)
    check(pipe(PROMPTS, **how), both, base)
    assert not compilations


@pytest.fixture(scope="module")
def tagged(folders, lora_files):
    """A pipeline that finds its LoRA in a folder when a prompt names it, and the LoRA's name."""
    file = lora_files("sd1")
    return sdjax.load(folders("sd1"), lora_dir=file.parent), file.stem


def test_tags(tagged, ours, lora_files, with_loras, noise, how):
    """Strengths of text encoder and UNet for one image of a batch; the other is the base's."""
    pipe, name = tagged
    before = pipe.prepare(PROMPTS, **how)
    made = pipe([f"{PROMPTS[0]} <lora:{name}:0.8:0.4>", PROMPTS[1]], **how)
    base = ours(PROMPTS, **how)
    expected = with_loras("sd1", [lora_files("sd1")], [{"unet": 0.4, "text_encoder": 0.8}], noise)
    check(made[0], expected[0], base[0])
    np.testing.assert_allclose(made[1], base[1], atol=1e-5)
    np.testing.assert_array_equal(made[0], pipe(PROMPTS, lora_scale=[[0.4, 0.8]], **how)[0])
    np.testing.assert_array_equal(pipe(PROMPTS, **how), base)  # a file of the folder acts where it is named
    for i, image in pipe.run(before):
        np.testing.assert_array_equal(image, base[i])


def test_steps_of_a_tag(tagged, ours, lora_files, with_loras, noise, how):
    pipe, name = tagged
    weights = [[{"unet": unet, "text_encoder": 0.0}] for unet in (0.0, 1.0)]
    for tag, order in (("start=1", weights), ("stop=1", weights[::-1])):
        made = pipe([f"{prompt}<lora:{name}:te=0:unet=1:{tag}>" for prompt in PROMPTS], **how)
        check(made, with_loras("sd1", [lora_files("sd1")], order[0], noise, order[1]), ours(PROMPTS, **how))


def test_weights_of_blocks(tagged, ours, folders, lora_files, how, tmp_path):
    """A list that leaves one block is a file whose other factors are zero."""
    pipe, name = tagged
    tensors = load_file(lora_files("sd1"))
    middle = {n: t if "mid_block" in n or "lora_up" not in n else 0 * t for n, t in tensors.items()}
    save_file(middle, tmp_path / "middle.safetensors")
    alone = sdjax.load(folders("sd1"), lora=[tmp_path / "middle.safetensors"])(PROMPTS, **how)
    weights = ",".join("1" if i == 13 else "0" for i in range(26))
    made = pipe([f"{prompt}<lora:{name}:1:lbw={weights}>" for prompt in PROMPTS], **how)
    check(made, alone, ours(PROMPTS, **how))


def test_records(tagged):
    """The prompt as written, and the LoRAs that act, with A1111's hash."""
    pipe, name = tagged
    rows = pipe.prepare([f"a cat <lora:{name}:0.5>", "a cat", f"a cat <lora:{name}:0>"], steps=2)
    assert [row.settings["prompt"] for row in rows[:2]] == [f"a cat <lora:{name}:0.5>", "a cat"]
    assert rows[0].settings["loras"] == [[name, 0.5, 0.5, hash_of(pipe.loras[0].path)]]
    assert all("loras" not in row.settings for row in rows[1:])


def test_peft_dora(opened, in_diffusers, folders, noise, how, tmp_path):
    """A file that diffusers saves of peft's layers, with the metadata that say its alpha and sqrt(rank)."""
    theirs = in_diffusers("StableDiffusionPipeline", "sd1")
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "ff.net.2", "conv1"], use_dora=True, use_rslora=True)
    try:
        theirs.unet.add_adapter(config, "style")
        draw = torch.Generator().manual_seed(0)
        for name, parameter in theirs.unet.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
            if "magnitude" in name:
                parameter.data *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=draw)
        tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet, adapter_name="style"))
        facts = theirs.unet.peft_config["style"].to_dict()
        theirs.save_lora_weights(tmp_path, unet_lora_layers=tensors, unet_lora_adapter_metadata=facts)
        sizes = {"width": zoo.SIDE, "height": zoo.SIDE, "num_inference_steps": STEPS}
        expected = theirs(PROMPTS, latents=to_torch(noise), output_type="np", **sizes, **HOW).images
    finally:
        theirs.unload_lora_weights()
    pipe = sdjax.load(folders("sd1"), lora=[tmp_path])
    base = opened("sd1")(PROMPTS, **how)
    check(pipe(PROMPTS, **how), expected, base)
    np.testing.assert_array_equal(pipe(PROMPTS, lora_scale=0, **how), base)
    merged = sdjax.load(folders("sd1"), merge_lora=[f"{tmp_path}:0.5"])
    check(pipe(PROMPTS, lora_scale=0.5, **how), merged(PROMPTS, **how), base)


def test_unlike_strengths_of_changed_weights(folders, lora_files, how, tmp_path):
    """Images whose weights differ do not share a batch, and are as they are alone."""
    tensors = {name: tensor for name, tensor in load_file(lora_files("sd1")).items() if "_attn2_to_v" in name}
    ups = {name: tensor for name, tensor in tensors.items() if "lora_up" in name}
    lengths = {name.replace("lora_up.weight", "dora_scale"): torch.ones(len(tensor), 1) for name, tensor in ups.items()}
    save_file({**tensors, **lengths}, tmp_path / "dora.safetensors")
    pipe = sdjax.load(folders("sd1"), lora_dir=tmp_path)
    tags = [f"<lora:dora:{scale}>" for scale in (1, 0.4)]
    both = pipe([prompt + tag for prompt, tag in zip(PROMPTS, tags, strict=True)], **how)
    for i, tag in enumerate(tags):
        alone = pipe([prompt + tag for prompt in PROMPTS], **how)
        np.testing.assert_allclose(both[i], alone[i], atol=1e-5)
    assert np.abs(both[1] - pipe(PROMPTS, lora_scale=1.0, **how)[1]).max() > 0.02
    with pytest.raises(UserError, match="has no start or stop"):
        pipe.prepare("a <lora:dora:1:start=2>")


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"lora_scale": [1, 2, 3]}, "<lora:sd1_0:1>", "lora_scale has 3 values for 1 LoRAs"),
        ({"lora_scale": [[1, 2, 3]]}, "", "choose a number for each, or a pair"),
        ({}, "a <lora:other:1>", "unknown LoRA 'other' in the prompt"),
        ({}, "a <lora:sd1_0:1:lbw=1,2>", "has 2 weights; lists have 17, 26, 12, 20"),
    ],
)
def test_faults(options, prompt, message, tagged):
    pipe, _ = tagged
    with pytest.raises(UserError) as error:
        pipe.prepare(prompt, **options)
    assert message in str(error.value)


def test_a_folder_is_read_as_it_is_now(folders, lora_files, tmp_path, caplog):
    """A first call may set strengths; files come, change and cannot be read while the pipeline stays."""
    pipe = sdjax.load(folders("sd1"), lora_dir=tmp_path)
    with pytest.raises(UserError, match="unknown LoRA 'style' in the prompt 'a <lora:style:1>'"):
        pipe.prepare("a <lora:style:1>")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    tensors = load_file(lora_files("sd1"))
    save_file(tensors, tmp_path / "style.safetensors", {"ss_output_name": "alias"})
    (row,) = pipe.prepare("a <lora:alias:1>", lora_scale=0.5, steps=2)
    assert "left out of lora_dir: " in caplog.text
    assert row.settings["loras"][0][:3] == ["alias", 1.0, 1.0]
    assert parameters(row.settings).startswith("a <lora:alias:1>\n"), "one tag"
    before = hash_of(tmp_path / "style.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "style.safetensors")
    assert hash_of(tmp_path / "style.safetensors") != before


def test_tags_without_loras_are_left_out(ours, caplog):
    """A prompt of another's image may name files that are not here."""
    assert ours.prepare("a <lora:style:1>", steps=2)
    assert (
        "'<lora:style:1>' is not understood in the prompt 'a <lora:style:1>': left out; lora and lora_dir"
        in caplog.text
    )
