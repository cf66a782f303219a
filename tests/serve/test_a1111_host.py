"""What A1111's API does without a model: names, seeds, masks, regions, sizes and ControlNet units."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from a1111_server import box_mask, in_base64, picture, pixels
from fastapi import HTTPException
from PIL import Image, ImageOps

from sdjax.cli.records import SAMPLER_LABELS
from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import start_of
from sdjax.serve.api.a1111.fields import ImageToImage, TextToImage
from sdjax.serve.api.a1111.generate import image_plan, text_plan
from sdjax.serve.api.a1111.inpainting import blurred_mask, cut_mask, filled, given_image
from sdjax.serve.api.a1111.progress import share_of
from sdjax.serve.api.a1111.resizing import CROP, FILL, STRETCH, region_of, resized
from sdjax.serve.api.a1111.samplers import noise_of, samplers, sampling_of, schedulers
from sdjax.serve.api.a1111.session import Override
from sdjax.serve.api.a1111.units import control_options, read_units
from sdjax.serve.jobs import Call
from sdjax.serve.limits import Limits


@pytest.mark.parametrize(
    ("sampler", "schedule", "wanted"),
    [
        ("Euler a", None, ("euler_a", "linspace")),
        ("Euler a", "automatic", ("euler_a", "linspace")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", "", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE", "automatic", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M", "SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("k_euler", "align_your_steps", ("euler", "ays")),
        ("DDIM", "karras", ("ddim", "leading")),
        ("LCM", "karras", ("lcm", None)),
        (None, "automatic", (None, None)),
        (None, "karras", (None, "karras")),
        (None, None, (None, None)),
    ],
)
def test_names_of_samplers_and_schedules(sampler: str | None, schedule: str | None, wanted: tuple):
    options, _ = sampling_of(sampler, schedule)
    assert (options.get("sampler"), options.get("schedule")) == wanted


def test_lists_name_what_requests_may_name():
    for item in samplers():
        own = sampling_of(item.name, None)[0]["sampler"]
        assert SAMPLER_LABELS[own] == item.name
        assert all(sampling_of(alias, None)[0]["sampler"] == own for alias in item.aliases)
        scheduled = sampling_of(item.name, "automatic")[0]
        assert scheduled.get("schedule") == item.options.get("scheduler", scheduled.get("schedule"))
    for item in schedulers()[1:]:
        for name in (item.name, item.label, *(item.aliases or ())):
            assert sampling_of("Euler", name)[0]["schedule"] == item.name
    with pytest.raises(HTTPException, match="404: Sampler not found"):
        sampling_of("Magic", None)
    with pytest.raises(UserError, match="unknown schedule 'fast' in the request"):
        sampling_of("Euler", "fast")


def test_noise_of_samplers_that_have_some():
    assert noise_of("euler_a", 0.5, 1.0, 0.0) == {"eta": 0.5}
    assert noise_of("dpmpp_2m", 1.0, 1.0, None) == {}, "eta acts on no such sampler"
    assert noise_of("euler_a", None, 1.1, None) == {"s_noise": 1.1}


def blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    """Rows under a Gaussian of 2 int(2.5 sigma + 0.5) + 1 pixels."""
    reach = int(2.5 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(values, ((0, 0), (reach, reach)), "reflect")
    return np.stack([np.convolve(row, kernel / kernel.sum(), "valid") for row in padded])


def test_a_mask_is_cut_inverted_and_blurred():
    """Against a sum over A1111's kernel of OpenCV, mirrored at the edges, within a grey value."""
    mask = box_mask((40, 30), (10, 5, 25, 20))
    request = ImageToImage(mask_blur=4)
    wanted = blurred(blurred(np.asarray(mask, float), 4).T, 4).T
    found = np.asarray(blurred_mask(mask, request), int)
    assert np.abs(found - wanted).max() <= 1
    inverted = blurred_mask(mask, ImageToImage(mask_blur=4, inpainting_mask_invert=1))
    assert np.abs(np.asarray(inverted, int) - (255 - found)).max() <= 1
    across = blurred_mask(mask, ImageToImage(mask_blur_x=3, mask_blur_y=0))
    assert np.abs(np.asarray(across, int) - blurred(np.asarray(mask, float), 3)).max() <= 1
    grey = mask.point([100 if value else 0 for value in range(256)])
    assert np.asarray(blurred_mask(grey, request)).max() == 0, "below half is not masked"
    alone = Image.new("RGBA", mask.size, "white")
    alone.putalpha(mask)
    np.testing.assert_array_equal(blurred_mask(alone, request), found)


@pytest.mark.parametrize("seed", range(8))
def test_a_region_holds_the_mask_in_the_proportions_of_the_image(seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        width, height = map(int, rng.integers(20, 120, 2))
        left, top = int(rng.integers(0, width - 1)), int(rng.integers(0, height - 1))
        box = left, top, int(rng.integers(left + 1, width + 1)), int(rng.integers(top + 1, height + 1))
        padding, size = int(rng.integers(0, 20)), (int(rng.integers(1, 9)) * 8, int(rng.integers(1, 9)) * 8)
        found = region_of(box_mask((width, height), box), padding, size)
        near, far = (max(side - padding, 0) for side in box[:2]), (side + padding for side in box[2:])
        padded = (*near, *map(min, far, (width, height)))
        assert 0 <= found[0] <= padded[0] < padded[2] <= found[2] <= width
        assert 0 <= found[1] <= padded[1] < padded[3] <= found[3] <= height
        sides = found[2] - found[0], found[3] - found[1]
        wanted = padded[2] - padded[0], padded[3] - padded[1]
        long = max(wanted[0], wanted[1] * size[0] / size[1]), max(wanted[1], wanted[0] * size[1] / size[0])
        assert sides == (min(int(long[0]), width), min(int(long[1]), height)), "as far as the image reaches"
    assert region_of(Image.new("L", (9, 9)), 4, (8, 8)) is None


def test_the_example_of_its_source():
    """A mask of 128x32 in an image that is sampled at 512x512 becomes a region of 128x128."""
    left, top, right, bottom = region_of(box_mask((512, 512), (100, 200, 228, 232)), 0, (512, 512))
    assert (right - left, bottom - top) == (128, 128)
    assert (left, top) == (100, 152)


def test_resize_modes():
    image = picture(1, (48, 32))
    np.testing.assert_array_equal(resized(image, (64, 64), STRETCH), image.resize((64, 64), Image.Resampling.LANCZOS))
    large = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resized(image, (64, 64), CROP), large[:, 16:80])
    small = np.asarray(image.resize((60, 40), Image.Resampling.LANCZOS))
    whole = np.asarray(resized(image, (60, 64), FILL))
    np.testing.assert_array_equal(whole[12:52], small)
    np.testing.assert_array_equal(whole[:12], np.repeat(small[:1], 12, axis=0))
    np.testing.assert_array_equal(whole[52:], np.repeat(small[-1:], 12, axis=0))
    for mode in (STRETCH, CROP, FILL):
        for size in ((7, 50), (50, 7), (33, 31), (1, 1)):
            assert resized(image, size, mode).size == size
            assert resized(image.convert("L"), size, mode).size == size


def test_what_is_masked_is_filled_with_the_colours_around_it():
    halves = Image.new("RGB", (64, 64), (200, 30, 30))
    halves.paste((20, 40, 220), (32, 0, 64, 64))
    mask = box_mask((64, 64), (8, 20, 20, 40))
    changed = halves.copy()
    changed.paste((0, 255, 0), (8, 20, 20, 40))
    made = np.asarray(filled(changed, mask), int)
    kept = np.asarray(mask) == 0
    np.testing.assert_array_equal(made[kept], np.asarray(halves, int)[kept])
    assert np.abs(made[22:38, 10:18] - (200, 30, 30)).max() < 25, "nothing of the green that was there"


def test_only_the_masked_part_is_put_back():
    original, mask = picture(2, (96, 64)), box_mask((96, 64), (60, 10, 80, 30))
    request = ImageToImage(mask_blur=2, inpaint_full_res=True, inpaint_full_res_padding=4, inpainting_fill=1)
    grey = blurred_mask(mask, request)
    given = given_image(original, grey, request, (64, 64))
    assert given.image.size == given.mask.size == (64, 64)
    left, top, right, bottom = given.region
    whole = original.crop(given.region).resize((64, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(given.image, whole)
    made = given.restored(np.asarray(Image.new("RGB", (64, 64), "white")))
    opacity = np.asarray(grey, float)[..., None] / 255.0
    wanted = 255.0 * opacity + np.asarray(original) * (1.0 - opacity)
    assert made.shape == (64, 96, 3)
    assert np.abs(made - wanted).max() <= 1.0
    assert (left, top) < (60, 10) < (80, 30) < (right, bottom)
    again = given.restored(np.asarray(given.image))
    assert np.abs(again.astype(int) - np.asarray(original)).max() <= 12, "resized there and back"


def test_the_whole_image_keeps_what_is_outside_of_twice_the_mask():
    original, mask = picture(3, (64, 64)), box_mask((64, 64), (20, 20, 44, 44))
    request = ImageToImage(mask_blur=4, inpaint_full_res=False, inpainting_fill=1)
    grey = blurred_mask(mask, request)
    given = given_image(original, grey, request, (64, 64))
    made = given.restored(np.zeros((64, 64, 3), np.uint8)).astype(float)
    opacity = np.minimum(2.0 * np.asarray(grey, float), 255.0)[..., None] / 255.0
    assert np.abs(made - np.asarray(original) * (1.0 - opacity)).max() <= 1.0
    nothing = given_image(original, Image.new("L", (64, 64)), ImageToImage(), (64, 64))
    assert nothing.mask is None, "a blank mask makes all anew, as there"


def test_masks_of_latents_have_one_value_a_latent():
    mask = box_mask((64, 64), (3, 3, 41, 22))
    cut = np.asarray(cut_mask(mask, 8))
    cells = cut.reshape(8, 8, 8, 8)
    assert (cells == cells[:, :1, :, :1]).all()
    small = np.asarray(mask.resize((8, 8)))
    np.testing.assert_array_equal(cut[::8, ::8], np.where(small >= 128, 255, 0))
    np.testing.assert_array_equal(cut_mask(mask, 1), mask)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(UserError, match="the mask is 32x32 pixels and its init_image 64x64"):
        given_image(picture(0, (64, 64)), box_mask((32, 32), (4, 4, 9, 9)), ImageToImage(), (64, 64))
    with pytest.raises(UserError, match="resize_mode 3: latents are not resized here; choose 0, 1 or 2"):
        given_image(picture(0, (64, 64)), None, ImageToImage(resize_mode=3), (32, 64))
    assert given_image(picture(0, (64, 64)), None, ImageToImage(resize_mode=3), (64, 64)).image.size == (64, 64)


HINT = picture(4)
NETS = ("control_v11p_sd15_canny", "depth")


def units(*args: dict, nets: tuple[str, ...] = NETS, init: Image.Image | None = None) -> dict:
    placed = read_units(list(args), nets, lambda text, place: ImageOps.invert(HINT) if text == "other" else HINT)
    return control_options(placed, len(nets), init, (64, 64))


def test_units_become_options():
    unit = {"image": "hint", "module": "canny", "model": "Control_v11p_sd15_canny [d14c016b]", "weight": 0.7}
    unit |= {
        "guidance_start": 0.1,
        "guidance_end": 0.8,
        "control_mode": "My prompt is more important",
        "resize_mode": 2,
    }
    unit |= {"threshold_a": 50, "threshold_b": 150, "pixel_perfect": True, "low_vram": True, "hr_option": "Both"}
    found = units(unit)
    assert found.pop("control_image")[0] is HINT
    assert found == {
        "control_from": ["canny:50:150", "none"],
        "control_scale": [0.7, 0.0],
        "control_start": [0.1, 0.0],
        "control_end": [0.8, 1.0],
        "control_mode": "prompt",
        "control_resize": "fill",
    }


def test_units_in_any_of_their_forms():
    both = units(
        {"input_image": ["other"], "model": "depth", "guidance": 0.5}, {"image": {"image": "x"}, "model": NETS[0]}
    )
    assert [image is HINT for image in both["control_image"]] == [True, False]
    assert both["control_end"] == [1.0, 0.5]
    for mode, words in enumerate(("Balanced", "My prompt is more important", "ControlNet is more important")):
        unit = {"image": "x", "model": "depth"}
        assert units(unit | {"control_mode": mode}) | {"control_image": 0} == units(unit | {"control_mode": words}) | {
            "control_image": 0
        }
    alone = units({"image": "x", "model": "None", "resize_mode": "Just Resize"}, nets=("depth",))
    assert (alone["control_scale"], alone["control_resize"]) == ([1.0], "stretch")
    assert units({"model": "depth"}, init=HINT)["control_image"][1] is HINT, "the image to begin from"
    for off in ([], [False], [{"enabled": False, "model": "none such"}], None):
        assert units(*(off or ()))["control_scale"] == [0.0, 0.0]
        assert read_units(off, NETS, lambda *_: HINT) == []
    assert control_options([], 0, None, (64, 64)) == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [{"model": "none such", "image": "x"}],
            "unknown ControlNet model 'none such' in ControlNet unit 0; choose one of",
        ),
        ([{"image": "x"}], "unknown ControlNet model ''"),
        ([{"model": "depth"}], "the ControlNet unit of model 'depth' has no image"),
        ([{"model": "depth", "image": "x"}] * 2, "ControlNet unit 1: two units have the model 'depth'"),
        ([{"model": "depth", "image": "x", "module": "openpose"}], "unknown ControlNet module 'openpose'"),
        ([{"model": "depth", "image": "x", "control_mode": "fast"}], "unknown ControlNet control_mode 'fast'"),
        ([{"model": "depth", "image": "x", "control_mode": 3}], "unknown ControlNet control_mode '3'"),
        (
            [{"model": "depth", "image": "x", "weight": 3}],
            "ControlNet unit 0: weight: Input should be less than or equal",
        ),
        ([{"model": "depth", "image": 5}], "ControlNet unit 0: image is no text in base64"),
        (
            [{"model": "depth", "image": "x", "resize_mode": 0}, {"model": NETS[0], "image": "x", "resize_mode": 1}],
            "ControlNet units have the resize_mode crop and stretch; choose one for all",
        ),
    ],
)
def test_units_that_cannot_act(args: list, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        units(*args)


def model(*inputs: str, **facts: Any) -> Any:
    """What a plan asks of a pipeline."""
    usual = {"default_size": (64, 48), "settings": {"steps": 20}, "refiner": None, "controlnets": ()}
    text, latents = SimpleNamespace(encoders=()), SimpleNamespace(factor=8)
    return SimpleNamespace(inputs=inputs, text=text, model=latents, **usual | facts)


def test_a_plan_leaves_to_the_checkpoint_what_a_request_leaves_out():
    plan = text_plan(TextToImage(seed=7, n_iter=2), model("prompt"), Limits(), Override())
    assert plan.calls == [Call("", None, {"width": 48, "height": 64, "seed": seed}) for seed in (7, 8)]
    (call,) = text_plan(TextToImage(prompt="", seed=0), model("class_label"), Limits(), Override()).calls
    assert call.prompt is None
    drawn = [text_plan(TextToImage(), model("prompt"), Limits(), Override()).about.seeds for _ in range(2)]
    assert drawn[0].all != drawn[1].all
    assert drawn[0].sub != drawn[0].all


def test_a_plan_of_image_to_image_counts_steps_as_a1111():
    body = {"init_images": [in_base64(picture(0, (48, 64)))], "seed": 0}
    for steps, strength, share in ((None, 0.75, 16), (10, 0.5, 6), (10, 1.0, 10), (10, 0.0, 1)):
        fields = ImageToImage(**body, steps=steps, denoising_strength=strength)
        (call,) = image_plan(fields, model("prompt"), Limits(), Override()).calls
        found = call.options["steps"]
        assert found == (steps or 20)
        assert found - start_of(found, call.options["strength"]) == share


def test_masks_are_of_latents_unless_the_model_was_trained_with_them():
    image, mask = picture(0, (48, 64)), box_mask((48, 64), (3, 3, 21, 30))
    body = {"init_images": [in_base64(image)], "mask": in_base64(mask), "mask_blur": 2, "inpaint_full_res": False}
    blurred = blurred_mask(mask, ImageToImage(mask_blur=2))
    for inputs, factor in ((("prompt",), 8), (("prompt", "mask"), 1)):
        (call,) = image_plan(ImageToImage(**body), model(*inputs), Limits(), Override()).calls
        np.testing.assert_array_equal(call.options["mask"], cut_mask(blurred, factor))
        assert call.options["paste"] is False


def test_hints_of_a_region_are_of_the_same_region():
    """Those of the image itself, and a unit's own image at the same place."""
    image, mask, hint = picture(0, (96, 96)), box_mask((96, 96), (20, 60, 40, 80)), picture(1, (96, 96))
    for given, source in ((None, image), (in_base64(hint), hint)):
        scripts = {"ControlNet": {"args": [{"image": given}]}}
        masked = {"mask": in_base64(mask), "mask_blur": 0, "inpainting_fill": 1, "alwayson_scripts": scripts}
        body = ImageToImage(init_images=[in_base64(image)], width=64, height=64, **masked)
        plan = image_plan(body, model("prompt", controlnets=("net",)), Limits(), Override())
        (found,) = plan.calls[0].options["control_image"]
        part = source.crop(plan.given[0].region)
        assert np.abs(pixels(found.resize(part.size, Image.Resampling.LANCZOS)) - pixels(part)).max() <= 12


def test_a_running_job_has_begun():
    """Clients wait for a progress of 0, which is the end."""
    assert share_of(SimpleNamespace(done=0, total=10)) == 0.01
    assert share_of(SimpleNamespace(done=5, total=10)) == 0.5
    assert share_of(SimpleNamespace(done=0, total=0)) == 0.01
