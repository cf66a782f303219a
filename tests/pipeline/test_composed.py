"""SDXL with two LoRAs, a ControlNet, an IP-Adapter and a refiner in one call, against PyTorch diffusers with the same.

|difference| of images below 1e-3. A prompt file and a grid give the images of that call.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import zoo
from PIL import Image
from test_against_diffusers import NEGATIVES, PROMPTS, check, to_torch
from test_control import HINT
from test_image_prompts import file_of, hub, seen
from test_lora import lora_files
from test_sample_script import run, script

import sdjax

__all__ = ["hub", "lora_files", "run", "script", "seen"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")]
STEPS, SHARE = 5, 0.6
GUIDED = {"guidance_scale": 4.0}
# Of the call, whatever its front end.
GIVEN = {"steps": STEPS, "sampler": "euler", "refiner_start": SHARE, "seed": 3, **GUIDED}
GIVEN |= {"width": zoo.SIDE, "height": zoo.SIDE, "control_scale": 0.8, "ip_scale": 0.6}


@pytest.fixture(scope="module")
def sources(folders, nets, hub, lora_files):
    """Arguments of `sdjax.load`, but for the checkpoint."""
    return {
        "lora": [f"{lora_files('sdxl', 0)}:0.5", str(lora_files("sdxl", 1))],
        "controlnet": [nets("sdxl")],
        "ip_adapter": str(file_of(hub, "sdxl", "plus")),
        "refiner": str(folders("sdxl_refiner")),
    }


@pytest.fixture(scope="module")
def pipe(folders, sources):
    return sdjax.load(folders("sdxl"), **sources)


@pytest.fixture
def files(seen, tmp_path):
    """Images of the call as files."""
    HINT.save(tmp_path / "hint.png")
    seen[0].save(tmp_path / "seen.png")
    return {"control_image": str(tmp_path / "hint.png"), "ip_image": str(tmp_path / "seen.png")}


def test_images_are_diffusers(pipe, in_torch, in_diffusers, nets, hub, lora_files, seen, noise, monkeypatch):
    """The base makes three of five steps, where it is interrupted, and the refiner two."""
    # The newest peft of PyPI is older than what transformers asks for, and does all the same.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *a, **k: None)
    base = in_torch("StableDiffusionXLControlNetPipeline", "sdxl", nets("sdxl"), sampler="EulerDiscreteScheduler")
    for seed, name in enumerate(("first", "second")):
        file = lora_files("sdxl", seed)
        base.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    base.set_adapters(["first", "second"], [0.5, 1.0])
    file = file_of(hub, "sdxl", "plus")
    base.load_ip_adapter(hub, file.parent.name, file.name, image_encoder_folder="models/image_encoder")
    base.set_ip_adapter_scale(GIVEN["ip_scale"])

    def hand_over(pipe, number, timestep, state):
        pipe._interrupt = number == 2
        return state

    common = {"negative_prompt": NEGATIVES, "num_inference_steps": STEPS, **GUIDED}
    latents = base(
        PROMPTS,
        image=[HINT] * 2,
        ip_adapter_image=seen[0],
        controlnet_conditioning_scale=GIVEN["control_scale"],
        latents=to_torch(noise),
        callback_on_step_end=hand_over,
        output_type="latent",
        **common,
    ).images
    base.unload_ip_adapter()  # its networks are those of other tests
    base.unload_lora_weights()
    refiner = in_diffusers("StableDiffusionXLImg2ImgPipeline", "sdxl_refiner", "EulerDiscreteScheduler")
    sizes = dict.fromkeys(("original_size", "target_size"), (zoo.SIDE, zoo.SIDE))
    expected = refiner(PROMPTS, image=latents, denoising_start=SHARE, output_type="np", **sizes, **common).images
    images = {"control_image": HINT, "ip_image": seen[0]}
    given = {name: value for name, value in GIVEN.items() if name not in ("width", "height", "seed")}
    check(pipe(PROMPTS, NEGATIVES, latents=noise, **images, **given), expected)
    for name in ("control_scale", "ip_scale", "lora_scale"):
        without = pipe(PROMPTS, NEGATIVES, latents=noise, **images, **{**given, name: 0.0})
        assert np.abs(without - expected).max() > 0.01, f"{name} changes nothing"


def test_a_prompt_file_and_a_grid_give_the_same_images(pipe, folders, sources, files, run, tmp_path):
    """Two strengths of the LoRAs of two prompts, the second of which has a scale of its own."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]} --ip_scale=1.2\n")
    flags = [
        f"--{name}={one}" for name, many in sources.items() for one in (many if isinstance(many, list) else [many])
    ]
    flags += [f"--{name}={value}" for name, value in {**GIVEN, **files}.items()]
    flags += [f"--from_file={tmp_path}/prompts.txt", "--grid=lora_scale=0,0.5", f"--outdir={tmp_path}/out"]
    code, _, said = run(*flags, checkpoint=folders("sdxl"))
    assert code == 0, said
    made = sorted((tmp_path / "out").glob("0*.png"))
    assert len(made) == 4
    assert (tmp_path / "out" / "grid.png").exists()
    for number, path in enumerate(made):
        prompt, strength = divmod(number, 2)
        index = json.loads(path.with_suffix(".json").read_text())["index"]
        given = {**GIVEN, **files, "lora_scale": strength / 2, "first_index": index}
        given |= {"ip_scale": 1.2} if prompt else {}
        (expected,) = pipe(PROMPTS[prompt], **given)
        np.testing.assert_allclose(np.asarray(Image.open(path), int), 255.0 * expected, atol=1.0)
