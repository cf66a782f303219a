"""A1111's txt2img and img2img: the cases of its own tests, each field's effect, and images equal to a call's."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import requests
from a1111_server import PROMPT, SIDE, box_mask, image_of, in_base64, picture, pixels
from PIL import Image

from sdjax.cli.settings.read import find_settings, read_settings
from sdjax.diffusion.samplers import network_calls, strength_of
from sdjax.serve.api.a1111.fields import ImageToImage, TextToImage
from sdjax.serve.api.a1111.generate import text_plan
from sdjax.serve.api.a1111.inpainting import blurred_mask, cut_mask, given_image
from sdjax.serve.api.a1111.session import Override
from sdjax.serve.limits import Limits

# A1111's own basic requests (test/test_txt2img.py, test/test_img2img.py), but for the size and the mask's blur.
COMMON = {
    "batch_size": 1,
    "cfg_scale": 7,
    "eta": 0,
    "height": SIDE,
    "n_iter": 1,
    "negative_prompt": "",
    "prompt": "example prompt",
    "restore_faces": False,
    "s_churn": 0,
    "s_noise": 1,
    "s_tmax": 0,
    "s_tmin": 0,
    "sampler_index": "Euler a",
    "seed": -1,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "steps": 3,
    "styles": [],
    "subseed": -1,
    "subseed_strength": 0,
    "tiling": False,
    "width": SIDE,
}
TEXT = {**COMMON, "denoising_strength": 0, "enable_hr": False, "firstphase_height": 0, "firstphase_width": 0}
IMAGE = {
    **COMMON,
    "denoising_strength": 0.75,
    "include_init_images": False,
    "inpaint_full_res": False,
    "inpaint_full_res_padding": 0,
    "inpainting_fill": 0,
    "inpainting_mask_invert": False,
    "mask": None,
    "mask_blur": 1,
    "override_settings": {},
    "resize_mode": 0,
}
MASK = box_mask((SIDE, SIDE), (8, 8, 24, 24))
OWN = {"sampler": "euler_a", "schedule": "linspace", "eta": 0.0, "steps": 3, "guidance_scale": 7.0}
OWN |= {"width": SIDE, "height": SIDE}


def made(server, image: str, prompt: str = PROMPT, negative: str | None = None, **options) -> None:
    """Hold an image to that of a call, and the settings inside it to the call's."""
    (wanted,) = server.pipe()(prompt, negative, **options)
    assert np.abs(pixels(image) - np.rint(255.0 * wanted)).max() <= 1
    values = read_settings(io.BytesIO(base64.b64decode(image)), place="the answer").values
    expected = {**options, "prompt": prompt, "negative_prompt": negative, "model": "tiny"}
    assert {name: values[name] for name in expected} == expected
    again = find_settings({"parameters": image_of(image).info["parameters"]}, "its text").values
    assert {name: again[name] for name in expected} == expected | {"negative_prompt": negative or ""}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (SIDE, SIDE)),
        ({"negative_prompt": "example negative prompt"}, (SIDE, SIDE)),
        ({"prompt": "((emphasis)), (emphasis1:1.1), [to:1], [from::2], [from:to:0.3], [alt|alt1]"}, (SIDE, SIDE)),
        ({"height": 2 * SIDE}, (SIDE, 2 * SIDE)),
        ({"enable_hr": True}, (2 * SIDE, 2 * SIDE)),
        ({"sampler_index": "PLMS"}, (SIDE, SIDE)),
        ({"sampler_index": "DDIM"}, (SIDE, SIDE)),
        ({"sampler_index": "UniPC"}, (SIDE, SIDE)),
    ],
)
def test_cases_of_its_own_txt2img(a1111, changes: dict, size: tuple[int, int]):
    answer = a1111.post("txt2img", **TEXT | changes)
    (image,) = map(image_of, answer["images"])
    assert image.size == size
    assert len(np.unique(np.asarray(image))) > 20, "no image of one colour"
    assert answer["parameters"]["prompt"] == (TEXT | changes)["prompt"]


@pytest.mark.parametrize("changes", [{"n_iter": 2}, {"batch_size": 2}])
def test_images_of_a_batch_have_seeds_of_their_own(a1111, changes: dict):
    answer = a1111.post("txt2img", **TEXT | changes | {"seed": 5, "prompt": PROMPT})
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6]
    assert len(info["infotexts"]) == len(answer["images"]) == 2
    for seed, image in zip((5, 6), answer["images"], strict=True):
        made(a1111, image, seed=seed, **OWN)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"tiling": True}, "tiling True: images are not made to tile here; leave it out"),
        ({"restore_faces": True}, "restore_faces True: faces are not restored here; leave it out"),
        ({"subseed_strength": 0.5}, "subseed_strength 0.5: there are no variation seeds here; leave it out"),
        ({"seed_resize_from_w": 32}, "seed_resize_from_w 32: seeds are not resized here; leave it out"),
        ({"s_churn": 2}, "s_churn 2: churn is not done here; leave it out"),
        ({"script_name": "sd upscale"}, "Script 'sd upscale' not found"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "always on script ADetailer not found"),
        ({"enable_hr": True, "hr_upscaler": "LDSR"}, "unknown upscaler 'LDSR' in hr_upscaler; choose one of: Lanczos"),
        ({"enable_hr": True, "hr_scale": 1e308}, "hires 1e+308 of 32x32: at most 16384 pixels a side are made"),
        ({"enable_hr": True, "hr_scale": 100}, "3200x3200: this server makes at most 2048"),
        ({"enable_hr": True, "hr_scale": 0.5}, "hires 0.5: choose a number of at least 1"),
        ({"enable_hr": True, "hr_prompt": "cat"}, "hr_prompt 'cat': the second pass has that of the first here"),
        ({"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 256}, "128x256 has other proportions than 32x32"),
        ({"batch_size": 9, "n_iter": 2}, "batch_size 9 times n_iter 2 is 18 images; at most 16"),
        ({"width": 10**9}, "width 1000000000 in the request: choose an integer of 1 to 16384"),
        ({"width": 4096}, "width 4096 in the request: at most 2048 pixels are made"),
        ({"width": 63}, "width 63 is not a multiple of 2"),
        ({"steps": 1000}, "steps 1000: this server runs at most 150"),
        ({"steps": 0}, "steps 0: choose an integer of at least 1"),
        ({"scheduler": "fast"}, "unknown schedule 'fast' in the request"),
        ({"override_settings": {"sd_model_checkpoint": "none such"}}, "unknown model 'none such'"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 99}},
            "CLIP_stop_at_last_layers 99: choose an integer of 1 to",
        ),
        ({"override_settings": {"randn_source": "TPU"}}, "unknown randn_source 'TPU'; choose one of: CPU, GPU, NV"),
        ({"cfg_scale": "many"}, "cfg_scale: Input should be a valid number"),
        ({"refiner_checkpoint": "sdxl_refiner"}, "unknown refiner 'sdxl_refiner'"),
    ],
)
def test_what_is_not_here_is_said_in_a_line(a1111, changes: dict, detail: str):
    found = a1111.post("txt2img", 422, **TEXT | changes)["detail"]
    assert detail in found
    assert "\n" not in found


def test_an_unknown_sampler_is_not_found(a1111):
    assert a1111.post("txt2img", 404, **TEXT | {"sampler_name": "Magic"}) == {"detail": "Sampler not found"}


def test_hires_is_the_second_pass_of_a_call(a1111):
    """A1111 runs all steps of the second pass, or as many as are named."""
    fields = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5, "seed": 3, "prompt": PROMPT}
    second = {"hires": 2.0, "hires_strength": 0.5, "seed": 3}
    (image,) = a1111.post("txt2img", **TEXT | fields)["images"]
    made(a1111, image, **OWN, **second, hires_steps=3)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"denoising_strength": 0.3}, {"hires": 2.0, "hires_strength": 0.3, "hires_steps": 3}),
        ({"denoising_strength": None}, {"hires": 2.0, "hires_strength": 0.75, "hires_steps": 3}),
        ({"hr_second_pass_steps": 7, "hr_scale": 1.5, "denoising_strength": 1}, {"hires": 1.5, "hires_steps": 7}),
        ({"hr_resize_x": 48}, {"hires": 1.5}),
        ({"hr_resize_x": 48, "hr_resize_y": 48, "hr_scale": 4}, {"hires": 1.5}),
        ({"hr_upscaler": "Latent (nearest-exact)", "hr_sampler_name": "Euler a", "hr_scheduler": "Automatic"}, {}),
        ({"denoising_strength": 0}, {"hires_strength": 0.001, "hires_steps": None}),
    ],
)
def test_options_of_the_second_pass(a1111, changes: dict, wanted: dict):
    fields = TEXT | {"enable_hr": True, "denoising_strength": 0.5} | changes
    plan = text_plan(TextToImage(**fields), a1111.pipe(), Limits(), Override())
    options = plan.calls[0].options
    assert {name: options.get(name) for name in wanted} == wanted
    (row,) = a1111.pipe().prepare(PROMPT, **options)
    assert network_calls(row.second.parts[0].table) == (wanted.get("hires_steps", 3) or 1)


def test_settings_of_one_request(a1111):
    """Another layer of the text encoder, noise of its own, and no images where none are wanted."""
    fields = {"seed": 3, "prompt": PROMPT, "eta": 0.5, "negative_prompt": "cat", "sampler_name": "Euler a Karras"}
    override = {"CLIP_stop_at_last_layers": 2, "sd_vae": "other.vae.pt", "sd_model_checkpoint": "tiny", "unknown": [1]}
    answer = a1111.post("txt2img", **TEXT | fields, override_settings=override)
    options = {**OWN, "schedule": "karras", "eta": 0.5, "clip_skip": 1}
    made(a1111, answer["images"][0], negative="cat", seed=3, **options)
    fields |= {"sampler_name": "Euler a", "eta": 0}
    answer = a1111.post("txt2img", **TEXT | fields, override_settings={**override, "randn_source": "CPU"})
    made(a1111, answer["images"][0], negative="cat", seed=3, **OWN, clip_skip=1, rng="torch")
    info = json.loads(answer["info"])
    assert info["clip_skip"] == 2
    assert info["sampler_name"] == "Euler a"
    assert info["comments"] == ["sd_vae 'other.vae.pt' is not followed: models have their own"]
    assert a1111.post("txt2img", **TEXT | fields, send_images=False)["images"] == []


def test_what_is_left_out_is_the_checkpoints(a1111):
    answer = a1111.post("txt2img", prompt=PROMPT, seed=2, width=SIDE, height=SIDE, steps=3)
    (wanted,) = a1111.pipe()(PROMPT, seed=2, width=SIDE, height=SIDE, steps=3)
    assert np.abs(pixels(answer["images"][0]) - np.rint(255.0 * wanted)).max() <= 1


def given(server, image: Image.Image, mask: Image.Image | None = None, **options) -> np.ndarray:
    """A call's image of a given one, of which two of three steps are run."""
    share = strength_of(2, 3)
    masked = {} if mask is None else {"mask": mask, "paste": False}
    (found,) = server.pipe()(PROMPT, init_image=image, strength=share, seed=1, **masked, **OWN, **options)
    return np.rint(255.0 * found).astype(np.uint8)


LARGE = in_base64(Image.new("L", (5000, 5000)))
HALF = {"denoising_strength": 0.5, "seed": 1, "prompt": PROMPT}


def test_an_image_to_begin_from_is_that_of_a_call(a1111):
    """At A1111's number of steps, from an image of any size."""
    wide = picture(0, (48, 32))
    fields = IMAGE | HALF | {"resize_mode": 1, "init_images": [in_base64(wide, "JPEG")]}
    answer = a1111.post("img2img", **fields)
    begun = image_of(in_base64(wide, "JPEG")).crop((8, 0, 40, 32))
    assert np.abs(pixels(answer["images"][0]) - given(a1111, begun)).max() <= 1
    assert answer["parameters"]["init_images"] is None
    assert json.loads(answer["info"])["denoising_strength"] == 0.5
    fields |= {"include_init_images": True, "batch_size": 2, "prompt": "cat"}
    fields["init_images"] = [f"data:image/png;base64,{in_base64(picture(seed))}" for seed in (0, 1)]
    answer = a1111.post("img2img", **fields)
    assert answer["parameters"]["init_images"] == fields["init_images"]
    first, second = answer["images"]
    alone = a1111.post("img2img", **fields | {"init_images": fields["init_images"][1:], "seed": 2, "batch_size": 1})
    assert np.abs(pixels(second) - pixels(alone["images"][0])).max() <= 1
    assert np.abs(pixels(first) - pixels(second)).max() > 20


@pytest.mark.parametrize(("content", "invert"), [(0, False), (1, True), (2, False), (3, False)])
def test_inpainting(a1111, content: int, invert: bool):
    """Outside of the blurred mask every pixel is the given one; what is inside is a call's, under the mask's edge."""
    image, fields = picture(), {"inpainting_mask_invert": invert, "inpainting_fill": content}
    body = IMAGE | HALF | fields | {"init_images": [in_base64(image)], "mask": in_base64(MASK)}
    found = pixels(a1111.post("img2img", **body)["images"][0])
    request = ImageToImage(**{name: value for name, value in body.items() if name != "mask"})
    blurred = blurred_mask(MASK, request)
    begun = given_image(image, blurred, request, image.size)
    latents = {} if content < 2 else {"masked_content": ["noise", "nothing"][content - 2]}
    wanted = begun.restored(given(a1111, begun.image, cut_mask(begun.mask, 2), **latents))
    assert np.abs(found - wanted).max() <= 1
    outside = np.asarray(blurred) == 0
    np.testing.assert_array_equal(found[outside], pixels(image)[outside])
    inside = np.asarray(blurred) == 255
    assert np.abs(found - pixels(image))[inside].max() > 20


def test_only_the_masked_part_at_full_size(a1111):
    image = picture(0, (160, 120))
    mask = box_mask(image.size, (100, 60, 120, 80))
    fields = {"inpaint_full_res": True, "inpaint_full_res_padding": 8, "mask_blur": 2, "inpainting_fill": 1}
    body = IMAGE | HALF | fields | {"init_images": [in_base64(image)], "mask": in_base64(mask)}
    answer = a1111.post("img2img", **body)
    found = pixels(answer["images"][0])
    request = ImageToImage(**{name: value for name, value in body.items() if name != "mask"})
    begun = given_image(image, blurred_mask(mask, request), request, (SIDE, SIDE))
    wanted = begun.restored(given(a1111, begun.image, cut_mask(begun.mask, 2)))
    assert found.shape == (120, 160, 3)
    assert np.abs(found - wanted).max() <= 1
    outside = np.ones((120, 160), bool)
    outside[54:86, 94:126] = False
    np.testing.assert_array_equal(found[outside], pixels(image)[outside])
    assert np.abs(found - pixels(image))[60:80, 100:120].max() > 20
    assert json.loads(answer["info"])["extra_generation_params"] == {
        "Mask blur": 2.0,
        "Inpaint area": "Only masked",
        "Masked content": "original",
        "Masked area padding": 8,
    }


@pytest.mark.parametrize(
    ("fields", "status", "detail"),
    [
        ({"init_images": []}, 404, "Init image not found"),
        ({"init_images": None}, 404, "Init image not found"),
        ({"init_images": ["bm8gaW1hZ2U="]}, 422, "Invalid encoded image"),
        ({"init_images": ["http://127.0.0.1/x.png"]}, 422, "Invalid encoded image"),
        ({"init_images": ["/etc/passwd"]}, 422, "Invalid encoded image"),
        ({"init_images": [in_base64(picture(), "GIF")]}, 422, "Invalid encoded image"),
        ({"mask": "!"}, 422, "Invalid encoded image"),
        (
            {"init_images": [in_base64(Image.new("L", (5000, 5000)))]},
            422,
            "the image is 5000x5000; at most 16777216 pixels",
        ),
        ({"init_images": [in_base64(picture())] * 2}, 422, "init_images: 2 images for 1; give one, or one for each"),
        (
            {"mask": in_base64(box_mask((8, 8), (0, 0, 4, 4))), "inpaint_full_res": True},
            422,
            "the mask is 8x8 pixels and its init_image 32x32",
        ),
        ({"initial_noise_multiplier": 2}, 422, "initial_noise_multiplier 2: noise is not scaled here"),
        ({"mask_blur": 65}, 422, "mask_blur: Input should be less than or equal to 64"),
        ({"denoising_strength": 1.5}, 422, "strength 1.5 in the request: choose a number of 0 to 1"),
        ({"resize_mode": 4}, 422, "resize_mode: Input should be 0, 1, 2 or 3"),
    ],
)
def test_images_that_cannot_be_read_or_used(a1111, fields: dict, status: int, detail: str):
    found = a1111.post("img2img", status, **IMAGE | {"init_images": [in_base64(picture())]} | fields)["detail"]
    assert detail in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "script_args": [NaN]}',
        b'{"prompt": "x", "override_settings": {"a": Infinity}}',
        b'{"prompt": "x", "cfg_scale": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "alwayson_scripts": {"a": "\\udc00"}}',
        b'{"prompt": "x", "alwayson_scripts": {"ControlNet": 5}, "steps": 1e400}',
        b'{"prompt": "x", "alwayson_scripts": {"ControlNet": {"args": [{"image": {"image": {}}, "model": "x"}]}}}',
        b'{"prompt": "x", "override_settings": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "x", "seed": 1' + b"0" * 400 + b"}",
        b'{"prompt": "' + b"x" * 70000 + b'"}',
        b'{"prompt": "x", "batch_size": 1' + b"0" * 300 + b"}",
        b'{"prompt": "x", "force_task_id": "' + b"x" * 300 + b'"}',
        b'["prompt"]',
        b"{",
        b"\xff\xfe",
        b"",
    ],
)
def test_hostile_bodies_are_refused(a1111, body: bytes):
    headers = {"Content-Type": "application/json"}
    for path in ("txt2img", "img2img", "options", "png-info", "extra-batch-images"):
        answer = requests.post(a1111.url(f"sdapi/v1/{path}"), data=body, headers=headers, timeout=60)
        refused = answer.status_code in (400, 404, 422)
        assert refused or path == "options", answer.text[:500]
        assert answer.status_code != 500
        assert "Traceback" not in answer.text
