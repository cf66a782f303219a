"""Clients of A1111's API, unchanged, and the requests of those that are no libraries."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
import requests
import webuiapi
from a1111_server import NET, PROMPT, SIDE, box_mask, image_of, in_base64, picture, pixels
from listening import listening
from PIL import Image

from sdjax.cli.settings.read import find_settings
from sdjax.data.hints.makers import hint_maker
from sdjax.serve.security import Access

SIZE = {"width": SIDE, "height": SIDE}
LONG = {"prompt": PROMPT, "steps": 150, "batch_size": 16, "seed": 1, **SIZE}
"""Seconds of work, of which a test sees the beginning."""


@pytest.fixture
def client(a1111):
    return webuiapi.WebUIApi(port=a1111.port, sampler="Euler a", steps=3)


def until(condition, seconds: float = 60.0):
    """The first answer that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come")


def in_background(function, *args, **options) -> tuple[threading.Thread, list]:
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(function(*args, **options)))
    thread.start()
    return thread, answers


def test_webuiapi_makes_images(client, a1111):
    found = client.txt2img(prompt=PROMPT, negative_prompt="cat", seed=4, cfg_scale=5, eta=0.0, batch_size=2, **SIZE)
    assert found.info["all_seeds"] == [4, 5]
    assert found.parameters["cfg_scale"] == 5
    options = {"sampler": "euler_a", "schedule": "linspace", "eta": 0.0, "steps": 3, "guidance_scale": 5.0, **SIZE}
    for seed, image, text in zip((4, 5), found.images, found.info["infotexts"], strict=True):
        (wanted,) = a1111.pipe()(PROMPT, "cat", seed=seed, **options)
        assert np.abs(pixels(image) - np.rint(255.0 * wanted)).max() <= 1
        assert image.info["parameters"] == text
        assert find_settings({"parameters": text}, "text").values.items() >= {**options, "seed": seed}.items()


def test_webuiapi_changes_images(client):
    image, mask = picture(), box_mask((SIDE, SIDE), (8, 8, 20, 20))
    whole = client.img2img(images=[image], prompt=PROMPT, seed=2, denoising_strength=0.5, **SIZE)
    assert np.abs(pixels(whole.image) - pixels(image)).max() > 20
    for full in (False, True):
        how = {"images": [image], "mask_image": mask, "inpaint_full_res": full, "inpainting_fill": 1, "mask_blur": 1}
        found = client.img2img(prompt=PROMPT, seed=2, denoising_strength=0.5, **how, **SIZE)
        difference = np.abs(pixels(found.image) - pixels(image)).max(axis=-1)
        assert difference[:4].max() == difference[-4:].max() == 0
        assert difference[10:18, 10:18].max() > 20
        assert found.info["extra_generation_params"]["Inpaint area"] == ("Only masked" if full else "Whole picture")


def test_webuiapi_follows_and_interrupts(client, a1111):
    """Progress grows and shows an image; an interrupted request is answered, and the next one is as ever."""
    idle = client.get_progress()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
    thread, answers = in_background(client.txt2img, **LONG)
    seen = until(lambda: (now := client.get_progress())["current_image"] and now)
    assert 0.0 < seen["progress"] < 1.0
    assert seen["state"]["job_count"] == 16
    assert seen["state"]["sampling_steps"] == 150
    assert len(np.unique(pixels(seen["current_image"]))) > 5
    assert until(lambda: (now := client.get_progress())["progress"] > seen["progress"] and now)
    assert a1111.get("progress", skip_current_image=True)["current_image"] is None
    assert client.interrupt() == {}
    thread.join(60.0)
    assert len(answers[0].images) == len(answers[0].info["infotexts"]) < 16
    assert answers[0].info["all_seeds"] == list(range(1, 17))
    after = client.get_progress()
    assert (after["progress"], after["state"]["job_count"], after["state"]["interrupted"]) == (0, 0, True)
    assert len(client.txt2img(prompt=PROMPT, **SIZE).images) == 1
    assert client.get_progress()["state"]["interrupted"] is False
    assert client.skip() == {}


def test_tasks_have_their_clients_names(client, a1111):
    def progress(task: str) -> dict:
        return requests.post(a1111.url("internal/progress"), json={"id_task": task}, timeout=60).json()

    assert requests.get(a1111.url("internal/ping"), timeout=60).json() == {}
    fields = {"url": a1111.url("sdapi/v1/txt2img"), "json": LONG | {"force_task_id": "task(abc)"}, "timeout": 60}
    thread, answers = in_background(requests.post, **fields)
    seen = until(lambda: (now := progress("task(abc)"))["active"] and now["live_preview"] and now)
    assert 0.0 < seen["progress"] < 1.0
    assert seen["live_preview"].startswith("data:image/png;base64,")
    assert not progress("another")["active"]
    client.interrupt()
    thread.join(60.0)
    assert answers[0].status_code == 200
    found = progress("task(abc)")
    assert (found["active"], found["completed"]) == (False, True)


def test_a_client_that_leaves_ends_its_job(a1111):
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(a1111.url("sdapi/v1/txt2img"), json=LONG, timeout=1.0)
    job = list(a1111.engine.jobs.values())[-1]
    until(lambda: job.state == "cancelled")


def test_webuiapi_reads_and_changes_options(client):
    assert client.get_options()["sd_model_checkpoint"] == "tiny"
    assert client.util_get_model_names() == ["controlled", "other", "styled", "tiny", "x4"]
    assert client.util_get_current_model() == "tiny"
    client.util_set_model("othr")
    assert client.util_get_current_model() == "other"
    assert client.txt2img(prompt=PROMPT, **SIZE).info["sd_model_name"] == "other"
    client.set_options({**client.get_options(), "sd_model_checkpoint": "tiny", "CLIP_stop_at_last_layers": 2})
    assert client.txt2img(prompt=PROMPT, **SIZE).info["clip_skip"] == 2
    client.set_options({"CLIP_stop_at_last_layers": 1, "unknown": {"a": [1]}})
    once = client.txt2img(prompt=PROMPT, override_settings={"sd_model_checkpoint": "other"}, **SIZE)
    assert (once.info["sd_model_name"], client.util_get_current_model()) == ("other", "tiny")
    client.util_wait_for_ready()


def test_options_of_a_request_may_stay(client, a1111):
    how = {"override_settings": {"sd_model_checkpoint": "other"}, "override_settings_restore_afterwards": False}
    client.txt2img(prompt=PROMPT, **how, **SIZE)
    assert client.util_get_current_model() == "other"
    a1111.post("options", sd_model_checkpoint="tiny")


def test_webuiapi_with_a_password(a1111):
    with listening(a1111.engine, Access("anna:geheim")) as address:
        port = int(address.rsplit(":")[-1])
        assert webuiapi.WebUIApi(port=port, username="anna", password="geheim").get_options() == a1111.get("options")
        wrong = webuiapi.WebUIApi(port=port, username="anna", password="falsch")
        assert wrong.get_options() == {"detail": "authentication is needed"}
        with pytest.raises(RuntimeError, match="401"):
            webuiapi.WebUIApi(port=port).txt2img(prompt=PROMPT, **SIZE)


def test_prompts_name_loras_and_words(client, a1111):
    a1111.post("options", sd_model_checkpoint="styled")
    style = {"name": "style", "alias": "style", "path": "style.safetensors", "metadata": {}}
    assert client.get_loras() == [style], "no path of the server"
    word = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 64, "vectors": 1}
    assert client.get_embeddings()["loaded"] == {"sparkle": word}
    prompt = f"{PROMPT} sparkle <lora:style:0.8>"
    found = client.txt2img(prompt=prompt, seed=3, eta=0.0, **SIZE)
    bare = client.txt2img(prompt=f"{PROMPT} sparkle", seed=3, eta=0.0, **SIZE)
    unknown = a1111.post("txt2img", 422, prompt="<lora:none such:1>", **SIZE)["detail"]
    a1111.post("options", sd_model_checkpoint="tiny")
    options = {"sampler": "euler_a", "schedule": "linspace", "eta": 0.0, "steps": 3, "guidance_scale": 7.0, "seed": 3}
    (wanted,) = a1111.pipe("styled")(prompt, **options, **SIZE)
    assert np.abs(pixels(found.image) - np.rint(255.0 * wanted)).max() <= 1
    assert np.abs(pixels(found.image) - pixels(bare.image)).max() > 5
    assert found.info["prompt"] == prompt
    assert "Lora hashes: " in found.info["infotexts"][0]
    assert "unknown LoRA 'none such'" in unknown


def test_webuiapi_lists(client):
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(client.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= set(client.util_get_scheduler_names())
    assert [one["name"] for one in client.get_upscalers()][:3] == ["None", "Lanczos", "Nearest"]
    assert client.get_sd_models()[0]["filename"] == "tiny.safetensors", "no path of the server"
    nothing = (client.get_sd_vae, client.get_hypernetworks, client.get_face_restorers, client.get_realesrgan_models)
    for names in (*nothing, client.get_prompt_styles, client.get_latent_upscale_modes, client.get_loras):
        assert names() == []
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.get_scripts() == {kind: ["controlnet", "controlnet m2m"] for kind in ("txt2img", "img2img")}
    assert client.get_memory()["ram"]["total"] > client.get_memory()["ram"]["used"] > 0
    assert client.get_cmd_flags() == {"api": True}
    assert client.refresh_checkpoints() is None


def test_webuiapi_reads_settings_of_images(client):
    made = client.txt2img(prompt=PROMPT, negative_prompt="cat, dog", seed=8, **SIZE)
    found = client.png_info(made.image)
    assert found.info == made.info["infotexts"][0]
    assert found.parameters["Prompt"] == PROMPT
    assert found.parameters["Negative prompt"] == "cat, dog"
    assert (found.parameters["Seed"], found.parameters["Size-1"]) == ("8", str(SIDE))
    assert "sdjax" in found.json["items"]
    nothing = client.png_info(picture())
    assert (nothing.info, nothing.parameters) == ("", {})


@pytest.mark.parametrize("upscaler", ["Lanczos", "Nearest", "None"])
def test_webuiapi_enlarges_images(client, upscaler: str):
    image = picture(0, (40, 24))
    found = client.extra_single_image(image, upscaler_1=upscaler, upscaling_resize=1.5).image
    kinds = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
    wanted = image.resize((60, 36), kinds[upscaler]) if upscaler in kinds else image
    np.testing.assert_array_equal(pixels(found), pixels(wanted))


def test_webuiapi_enlarges_images_to_a_size(client):
    image = picture(0, (40, 24))
    how = {"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 48, "upscaling_resize_h": 48}
    large = pixels(image.resize((80, 48), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(pixels(client.extra_single_image(image, **how).image), large[:, 16:64])
    first, second = client.extra_batch_images([image, image.rotate(180)], upscaling_crop=False, **how).images
    np.testing.assert_array_equal(pixels(first), large)
    np.testing.assert_array_equal(pixels(second), large[::-1, ::-1])
    blend = {"upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.25, "upscaling_crop": False}
    nearest = pixels(image.resize((80, 48), Image.Resampling.NEAREST))
    found = pixels(client.extra_single_image(image, **how | blend).image)
    assert np.abs(found - (0.75 * large + 0.25 * nearest)).max() <= 1


def test_a_loaded_model_enlarges_images(client, a1111):
    a1111.post("options", sd_model_checkpoint="x4")
    a1111.post("options", sd_model_checkpoint="tiny")
    assert client.get_upscalers()[-1]["name"] == "x4"
    pipe, image = a1111.pipe("x4"), picture(0, (15, 16))
    (wanted,) = pipe("", init_image=image, seed=0)
    found = client.extra_single_image(image, upscaler_1="x4", upscaling_resize=pipe.model.factor).image
    assert np.abs(pixels(found) - np.rint(255.0 * wanted)).max() <= 1
    assert client.extra_single_image(image, upscaler_1="x4", upscaling_resize=4).image.size == (60, 64)


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"upscaler_1": "R-ESRGAN 4x+"}, "unknown upscaler 'R-ESRGAN 4x+'; choose one of: Lanczos, Nearest, None"),
        ({"gfpgan_visibility": 0.5}, "gfpgan_visibility 0.5: faces are not restored here"),
        ({"upscaler_1": "Lanczos", "upscaling_resize": 64}, "4096x4096 pixels"),
        ({"upscaler_1": "Lanczos", "upscaling_resize": 0}, "upscaling_resize: Input should be greater than 0"),
        ({"resize_mode": 2}, "resize_mode: Input should be 0 or 1"),
    ],
)
def test_enlargements_that_cannot_be(a1111, fields: dict, detail: str):
    large = {"image": in_base64(picture(0, (128, 128)))} if "4096" in detail else {"image": in_base64(picture())}
    found = a1111.post("extra-single-image", 422, **large | fields)["detail"]
    assert detail.replace("4096x4096", "8192x8192") in found


def test_controlnet_units_of_webuiapi(client, a1111):
    """A unit's image is a call's; without units the ControlNet does nothing."""
    a1111.post("options", sd_model_checkpoint="controlled")
    assert client.controlnet_model_list() == [NET]
    assert "canny" in client.controlnet_module_list()
    assert client.controlnet_version() == 2
    how = {"module": "canny", "model": f"{NET} [0123abcd]", "weight": 0.8, "guidance_end": 0.7, "control_mode": 2}
    unit = webuiapi.ControlNetUnit(image=picture(3), threshold_a=40, threshold_b=90, pixel_perfect=True, **how)
    fields = {"prompt": PROMPT, "seed": 6, "eta": 0.0, **SIZE}
    found = client.txt2img(controlnet_units=[unit], **fields)
    bare = client.txt2img(**fields)
    a1111.post("options", sd_model_checkpoint="tiny")
    options = {"sampler": "euler_a", "schedule": "linspace", "eta": 0.0, "steps": 3, "seed": 6, "guidance_scale": 7.0}
    control = {"control_image": picture(3), "control_from": "canny:40:90", "control_scale": 0.8, "control_end": 0.7}
    control |= {"control_mode": "control", "control_resize": "fill"}
    (wanted,) = a1111.pipe("controlled")(PROMPT, **options, **control, **SIZE)
    assert np.abs(pixels(found.image) - np.rint(255.0 * wanted)).max() <= 1
    alone = client.txt2img(**fields)
    assert np.abs(pixels(bare.image) - pixels(alone.image)).max() <= 1
    assert np.abs(pixels(bare.image) - pixels(found.image)).max() > 5
    refused = a1111.post("txt2img", 422, **fields, alwayson_scripts={"ControlNet": {"args": [unit.to_dict()]}})
    assert refused["detail"] == "ControlNet unit 0: no ControlNet is loaded"


def test_hints_are_shown(a1111):
    fields = {"controlnet_module": "canny", "controlnet_input_images": [in_base64(picture(3))]}
    found = requests.post(a1111.url("controlnet/detect"), json=fields, timeout=60).json()
    np.testing.assert_array_equal(pixels(found["images"][0]), hint_maker("canny")(np.asarray(picture(3))))


def test_sillytavern(a1111):
    """Its requests in their order (src/endpoints/stable-diffusion.js): connect, fill menus, choose, generate, stop."""
    options = a1111.get("options")
    titles = [model["title"] for model in a1111.get("sd-models")]
    assert options["sd_model_checkpoint"] in titles
    sampler = next(one["name"] for one in a1111.get("samplers") if one["name"] == "DPM++ 2M")
    scheduler = next(one["name"] for one in a1111.get("schedulers") if one["label"] == "Karras")
    assert a1111.get("sd-vae") == []
    names = [one["name"] for path in ("upscalers", "latent-upscale-modes") for one in a1111.get(path)]
    a1111.post("options", sd_model_checkpoint=titles[1])
    until(lambda: (now := a1111.get("progress"))["progress"] == 0 and now["state"]["job_count"] == 0)
    assert a1111.get("options")["sd_model_checkpoint"] == titles[1]
    body = {
        "prompt": PROMPT,
        "negative_prompt": "cat",
        "sampler_name": sampler,
        "scheduler": scheduler,
        "steps": 3,
        "cfg_scale": 7,
        **SIZE,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": names[0],
        "hr_scale": 1,
        "hr_additional_steps": 0,
        "denoising_strength": 0.7,
        "clip_skip": 1,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
        "save_images": True,
        "send_images": True,
    }
    image = image_of(a1111.post("txt2img", **body)["images"][0])
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in image.info["parameters"]
    a1111.post("options", sd_model_checkpoint="tiny")
    thread, answers = in_background(a1111.post, "txt2img", **body | {"steps": 150, "batch_size": 16})
    until(lambda: a1111.get("progress")["state"]["job_count"] == 16)
    assert a1111.post("interrupt") == {}
    thread.join(60.0)
    assert len(answers[0]["images"]) < 16


def test_open_webui(a1111):
    """It reads all options and writes them all back with another checkpoint, then sends a request of its own form."""
    options = a1111.get("options")
    assert "other" in [model["title"] for model in a1111.get("sd-models")]
    assert a1111.post("options", **options | {"sd_model_checkpoint": "other"}) is None
    body = {"prompt": PROMPT, "batch_size": 1, **SIZE, "steps": 3, "negative_prompt": "cat"}
    answer = a1111.post("txt2img", **body | {"cfg_scale": 7.0, "sampler_name": "Euler", "scheduler": "Automatic"})
    file = io.BytesIO()
    image_of(answer["images"][0]).save(file, "PNG")
    assert "Model: other" in image_of(answer["images"][0]).info["parameters"]
    assert a1111.post("options", **options) is None
    assert a1111.get("options") == options


def test_its_own_tests_of_options(a1111):
    before = a1111.get("options")["send_seed"]
    a1111.post("options", send_seed=not before)
    assert a1111.get("options")["send_seed"] == (not before)
    a1111.post("options", send_seed=before)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        (
            {"sd_model_checkpoint": "none such"},
            "unknown model 'none such' in sd_model_checkpoint",
        ),
        ({"CLIP_stop_at_last_layers": 0}, "CLIP_stop_at_last_layers 0: choose an integer of 1 to 12"),
        ({"CLIP_stop_at_last_layers": "two"}, "CLIP_stop_at_last_layers 'two': choose an integer of 1 to 12"),
    ],
)
def test_options_that_cannot_be(a1111, changes: dict, detail: str):
    before = a1111.get("options")
    assert detail in a1111.post("options", 422, **{"send_seed": not before["send_seed"], **changes})["detail"]
    assert a1111.get("options") == before, "nothing has been changed"


def test_checkpoints_come_and_go(a1111):
    a1111.post("options", sd_model_checkpoint="other")
    assert a1111.post("unload-checkpoint") == {}
    assert a1111.engine.models.all["other"].pipe is None
    assert a1111.post("reload-checkpoint") == {}
    assert a1111.engine.models.all["other"].pipe is not None
    a1111.post("options", sd_model_checkpoint="tiny")
