"""The same words mean different things in the programs that write them; flags win before a value is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdjax.cli.jobs import ImageJob, suit_encoder
from sdjax.cli.records import parameters
from sdjax.cli.settings.read import find_settings
from sdjax.cli.settings.settings import Settings
from sdjax.core.errors import UserError
from sdjax.models.clip import VARIANTS

PLACE = "x.png"


def a1111(line: str, prompts: str = "red heart\nNegative prompt: blurry") -> Settings:
    return find_settings({"parameters": f"{prompts}\n{line}"}, PLACE)


def line(sampler: str = "Euler a", **rest: Any) -> str:
    pairs = {"Steps": 20, "Sampler": sampler, "CFG scale": 7, "Seed": 12, "Size": "128x128"}
    pairs |= {name.replace("_", " "): value for name, value in rest.items()}
    return ", ".join(f"{name}: {value}" for name, value in pairs.items())


def settled(found: Settings, *given: str) -> dict[str, Any]:
    found.drop(given)
    return found.values


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours"),
    [
        ("Euler a", None, ("euler_a", "linspace")),
        ("Euler A", "Automatic", ("euler_a", "linspace")),
        ("DPM++ 2M", None, ("dpmpp_2m", "linspace")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 3M SDE", "Automatic", ("dpmpp_3m_sde", "exponential")),
        ("DPM++ 2M SDE Karras", None, ("dpmpp_2m_sde", "karras")),
        ("DPM++ 2M SDE SGMUniform", None, ("dpmpp_2m_sde", "sgm_uniform")),
        ("DPM++ 2M AYS", None, ("dpmpp_2m", "ays")),
        ("DPM++ 2M Turbo", None, ("dpmpp_2m", "trailing")),
        ("k_euler_a", None, ("euler_a", "linspace")),
        ("euler_ancestral", "karras", ("euler_a", "karras")),
        ("Euler", "Polyexponential", ("euler", "exponential")),
        ("Euler", "Align Your Steps", ("euler", "ays")),
        ("Euler", "DDIM", ("euler", "leading")),
        ("Euler", "Normal", ("euler", "linspace")),
        # These step on timesteps of their own there, whatever the schedule.
        ("DDIM", None, ("ddim", "leading")),
        ("DDIM", "Karras", ("ddim", "leading")),
        ("PLMS", "Automatic", ("plms", "leading")),
        ("LCM", "Automatic", ("lcm", None)),
    ],
)
def test_samplers_and_schedules_of_a1111(sampler: str, schedule: str | None, ours: tuple[str, str | None]):
    values = settled(a1111(line(sampler, **({"Schedule type": schedule} if schedule else {}))))
    assert (values["sampler"], values.get("schedule")) == ours


UNKNOWN = [
    *("Restart", "DPM fast", "DPM adaptive", "DDIM CFG++", "DPM++ 2M alt Karras", "DPM++ 2M SDE Heun Karras"),
    *("Undefined", "DPM Solver++", "x" * 300),
]


@pytest.mark.parametrize("sampler", UNKNOWN)
def test_unknown_samplers_are_refused_by_name_unless_one_is_given(sampler: str):
    with pytest.raises(UserError, match=r"unknown sampler '.*' in x\.png; choose one of: ddim, ") as error:
        a1111(line(sampler)).drop(())
    assert len(str(error.value)) < 400
    values = settled(a1111(line(sampler)), "sampler")
    assert values["steps"] == 20
    assert "sampler" not in values
    assert values.get("schedule") in (None, "karras"), "what follows from a sampler alone goes with it"


@pytest.mark.parametrize("schedule", ["Align Your Steps GITS", "Align Your Steps 32", "Karras Exponential", "nope"])
def test_unknown_schedules_are_refused_by_name_unless_one_is_given(schedule: str):
    text = line("Euler", **{"Schedule type": schedule})
    with pytest.raises(UserError, match=rf"unknown schedule '{schedule}' in x\.png; choose one of: ays, "):
        a1111(text).drop(())
    assert "schedule" not in settled(a1111(text), "schedule")


@pytest.mark.parametrize(
    ("name", "text", "given"),
    [
        ("steps", line(Steps="many"), "steps"),
        ("guidance_scale", line(**{"CFG scale": "nan"}), "guidance_scale"),
        ("seed", line(Seed="9" * 5000), "seed"),
        ("width", line(Size="999999x8"), "width"),
        ("index", line(**{"Image index": -3}), "first_index"),
        ("eta", line(Eta=7), "eta"),
    ],
)
def test_flags_win_before_a_value_is_refused(name: str, text: str, given: str):
    with pytest.raises(UserError, match=r" in x\.png: ") as error:
        a1111(text).drop(())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert name not in settled(a1111(text), given)


def test_numbers_of_other_hands():
    assert settled(a1111(line(**{"CFG scale": "7,5", "Seed": -1})))["guidance_scale"] == 7.5
    found = a1111(line(Seed=-1))
    assert settled(found)["seed"] == -1
    assert "seed -1 stands for a random one, which the text does not name" in found.notes


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"Hires upscale": 2}, (128, 128, 2.0)),
        ({"Hires resize": "256x256"}, (128, 128, 2.0)),
        ({"Hires resize": "192x0"}, (128, 128, 1.5)),
        ({"Size": "256x256", "First pass size": "128x128"}, (128, 128, 2.0)),
        ({"Size": "1024x512", "First pass size": "0x0"}, (768, 384, 4 / 3)),
    ],
)
def test_second_passes_of_a1111_by_any_size(extra: dict[str, Any], wanted: tuple[int, int, float]):
    """The strength is then the second pass's; the program's own first size is old_hires_fix_first_pass_dimensions."""
    found = a1111(line(**{**extra, "Denoising strength": 0.5, "Hires upscaler": "Latent"}))
    values = settled(found)
    assert (values["width"], values["height"], values["hires"]) == wanted
    assert values["hires_strength"] == 0.5
    assert "strength" not in values
    assert any("Hires upscaler: Latent" in note for note in found.notes)
    assert values["hires_steps"] == 20, "all of them"


def test_a_crop_of_a_second_pass_is_named():
    found = a1111(line(**{"Hires resize": "256x192", "Denoising strength": 0.5}))
    assert settled(found)["hires"] == 2.0
    assert "the second pass is not cropped to 256x192" in found.notes


@pytest.mark.parametrize("strength", [0, 0.7])
def test_strength_acts_only_beside_an_image(strength: float):
    """A1111's API once wrote it into every text."""
    text = line(**{"Denoising strength": strength})
    assert "strength" not in settled(a1111(text))
    assert settled(a1111(text), "init_image")["strength"] > 0.0
    hires = line(**{"Hires upscale": 2, "Denoising strength": 0.5})
    assert not {"hires", "hires_strength", "hires_steps"} & settled(a1111(hires), "init_image").keys()


@pytest.mark.parametrize(
    ("label", "content"),
    [("original", "image"), ("latent noise", "noise"), ("latent nothing", "nothing"), ("fill", None)],
)
def test_latents_under_a_mask_are_those_of_a1111(label: str, content: str | None):
    text = line(**{"Denoising strength": 0.5, "Masked content": label})
    assert settled(a1111(text), "init_image", "mask").get("masked_content") == content
    assert "masked_content" not in settled(a1111(text), "init_image")
    noted = any(f"Masked content: {label}" in note for note in a1111(text).notes)
    assert noted == (content is None), "colours are not filled in here"
    if content is not None:
        record = {"prompt": "cat", "steps": 3, "sampler": "euler", "seed": 1, "masked_content": content}
        assert f"Masked content: {label}" in parameters(record)


def test_steps_of_a_second_pass_are_named():
    second = {"Hires upscale": 2, "Denoising strength": 0.5, "Hires steps": 7}
    assert settled(a1111(line(**second)))["hires_steps"] == 7
    assert "hires_steps" not in settled(a1111(line(**second | {"Denoising strength": 0})))
    assert "hires_steps" not in settled(a1111(line(**{"Hires steps": 7})))


@pytest.mark.parametrize("steps", [1, 7, 20, 29, 100])
@pytest.mark.parametrize("strength", [0.0, 0.29, 0.5, 0.75, 1.0])
def test_image_to_image_runs_as_many_steps_as_there(steps: int, strength: float):
    """A1111 runs int(min(strength, 0.999) steps) + 1 of them, ComfyUI all."""
    values = settled(a1111(line(Steps=steps, **{"Denoising strength": strength})), "init_image")
    assert int(values["strength"] * values["steps"]) == int(min(strength, 0.999) * steps) + 1
    if strength:
        inputs = {"seed": 1, "steps": steps, "cfg": 7, "sampler_name": "euler", "scheduler": "normal"}
        node = {"class_type": "KSampler", "inputs": inputs | {"denoise": strength, "positive": ["2", 0]}}
        text = {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}}
        graph = f'{{"1": {node}, "2": {text}}}'.replace("'", '"')
        values = settled(find_settings({"prompt": graph}, PLACE), "init_image")
        total = int(steps / strength)
        assert (values["steps"], int(values.get("strength", 1.0) * total)) == (total, steps)


@pytest.mark.parametrize(
    ("version", "layer", "first", "other"),
    [
        ("v1.9.0", 2, 1, 0),  # of Stable Diffusion 2 and XL it ignores it
        ("f2.0.1v1.10.1", 2, 1, 0),  # counted from the output, of which those leave out one layer
        ("f2.0.1v1.10.1", 3, 2, 1),
        ("1", 1, 0, 0),
    ],
)
def test_clip_skip_by_program_and_family(version: str, layer: int, first: int, other: int):
    found = a1111(line(Version=version, **{"Clip skip": layer}))
    assert (found.values["clip_skip"], found.penultimate["clip_skip"]) == (first, other)


def test_noise_is_followed_where_it_is_pytorchs_on_a_cpu():
    assert settled(a1111(line(RNG="CPU")))["rng"] == "torch"
    for source in ("NV", "GPU"):
        found = a1111(line(RNG=source, ENSD=31337))
        assert "rng" not in settled(found)
        assert f"RNG {source} is not followed: the noise of its seeds is a GPU's, so images differ" in found.notes
        assert any("ENSD: 31337" in note for note in found.notes)


@pytest.mark.parametrize(
    "prompts",
    [
        ("red heart", "blurry"),
        ("a sign that says Negative prompt: no", "Steps: 3, Sampler: none"),
        ("Steps: 3, Sampler: nothing, Seed: 1\nred heart", "bad,\nworse"),
        ("red heart,\nbig, BREAK\nround", ""),
        ("", "blurry"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "after", ["", "\nTemplate: red {heart|star}\nNegative Template: blurry", "\n\nADetailer: a, b: c, d: e"]
)
def test_prompts_end_where_they_end(prompts: tuple[str, str], end: str, after: str):
    """Lines after the settings, as Dynamic Prompts writes, belong to no prompt, and are named."""
    negative = f"\nNegative prompt: {prompts[1]}" if prompts[1] else ""
    text = f"{prompts[0]}{negative}\n{line()}{after}".replace("\n", end)
    found = find_settings({"parameters": text}, PLACE)
    assert (found.values["prompt"], found.values["negative_prompt"]) == prompts
    assert (found.values["steps"], found.values["sampler"], found.values["seed"]) == (20, "euler_a", 12)
    assert all(any(part in note for note in found.notes) for part in after.split("\n"))


def test_quoted_and_grouped_values_hold_their_commas():
    text = line(
        **{
            "Template": '"red, {heart|star}: Seed: 3, \\"q\\""',
            "Hashes": '{"vae": "1", "model": "2"}',
            "ControlNet 0": '"Module: canny, Weight: 1, Steps: 9"',
            "Lora hashes": '"a: 1, b: 2"',
        }
    )
    found = a1111(text)
    assert (found.values["seed"], found.values["steps"]) == (12, 20)
    (note,) = (note for note in found.notes if note.startswith("not followed"))
    for part in ('Template: red, {heart|star}: Seed: 3, "q"', "ControlNet 0: Module: canny", "Lora hashes: a: 1, b: 2"):
        assert part in note


@pytest.mark.parametrize("text", ["a cat", "red: heart, blue: flag\nx", '{"foo": 1}', "[1, 2]", '{"prompt": "x"', "{}"])
def test_parameters_of_unknown_programs_are_refused_by_name(text: str):
    with pytest.raises(UserError, match=r"the parameters text of x\.png (has no line of settings|is JSON|is not JSON)"):
        find_settings({"parameters": text}, PLACE)


def test_the_first_of_equal_names_wins():
    """A1111 writes its own first; what extensions add is not always quoted."""
    found = a1111(line(Template="a, Seed: 9, Steps: 99"))
    assert (found.values["seed"], found.values["steps"]) == (12, 20)


def test_sizes_are_cut_as_there():
    found = a1111(line(Size="130x125"))
    assert (found.values["width"], found.values["height"]) == (128, 120)
    assert "height 125 made an image of 120 pixels" in found.notes


def test_sdnext_has_names_of_its_own():
    text = "Steps: 20, Seed: 1, Sampler: {}, CFG scale: 7, CFG rescale: 0.7, App: SD.Next, Sampler sigma: karras"
    found = a1111(text.format("KDPM2 a") + ", Hires scale: 1.5, Hires strength: 0.4, Clip skip: 2")
    ours = {"sampler": "dpm2_a", "schedule": "karras", "guidance_rescale": 0.7, "hires": 1.5, "hires_strength": 0.4}
    assert settled(found).items() >= ours.items()
    assert (found.values["clip_skip"], found.penultimate["clip_skip"]) == (1, 1)
    assert "schedule" not in settled(a1111("Steps: 20, Seed: 1, CFG scale: 7, App: SD.Next")), "the checkpoint's own"


@pytest.mark.parametrize(
    ("variants", "wanted"), [(("clip_l",), 1), (("openclip_h_sd2",), 0), (("clip_l", "openclip_bigg"), 0)]
)
def test_layers_are_those_of_the_models_family(variants: tuple[str, ...], wanted: int):
    """Stable Diffusion 1, 2 and XL, by their text encoders; an option that is given stays."""
    encoders = [SimpleNamespace(config=VARIANTS[name]) for name in variants]
    pipe: Any = SimpleNamespace(text=SimpleNamespace(encoders=encoders))
    jobs = [ImageJob(0, 0, "x", {"clip_skip": skip, "steps": 4}) for skip in (1, 3)]
    suited = suit_encoder(pipe, jobs, {"clip_skip": (1, 0)})
    assert [job.options for job in suited] == [{"clip_skip": wanted, "steps": 4}, {"clip_skip": 3, "steps": 4}]
