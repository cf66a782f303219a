"""Images that the page is given: their settings, images to begin from, masks, hints."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from page_driver import (
    ask,
    decoded,
    drop,
    field,
    generate,
    pixels,
    plain_png,
    posted,
    read_bytes,
    serving,
    thumbnail,
    thumbnail_pixels,
    tile,
    unfold,
    visit,
    watch,
    write,
)
from playwright.sync_api import BrowserContext, Page, expect

pytestmark = pytest.mark.slow

Point = tuple[float, float]


def test_a_dropped_image_gives_its_settings(tab: Page, address: str):
    job = generate(tab, prompt="red heart", negative_prompt="blue", steps=3, seed=11, guidance_scale=3.5)
    expect(tile(tab, job)).to_be_visible()
    tab.get_by_role("button", name="Reset").click()
    expect(field(tab, "prompt")).to_have_value("")
    write(tab, num_images=4)
    drop(tab, "body", read_bytes(address, job))
    expected = {"prompt": "red heart", "negative_prompt": "blue", "steps": "3", "seed": "11", "guidance_scale": "3.5"}
    for name, value in {**expected, "sampler": "ddim", "height": "128", "num_images": ""}.items():
        expect(field(tab, name)).to_have_value(value)
    expect(tab.locator("#drop-hint")).to_be_hidden()


def test_a_chosen_file_gives_its_settings(tab: Page, address: str):
    job = generate(tab, prompt="red heart", steps=2, seed=13)
    expect(tile(tab, job)).to_be_visible()
    write(tab, seed=1)
    file = {"name": "image.png", "mimeType": "image/png", "buffer": read_bytes(address, job)}
    tab.locator("#settings-file").set_input_files(files=[file])
    expect(field(tab, "seed")).to_have_value("13")


def test_an_image_without_settings_may_be_begun_from(tab: Page):
    drop(tab, "body", plain_png())
    expect(tab.locator("#toast")).to_contain_text("does not say how it was made")
    tab.get_by_role("button", name="Use as init image").click()
    expect(thumbnail(tab, "init_image")).to_be_visible()
    assert (thumbnail_pixels(tab, "init_image") == 255).all()


def test_a_field_takes_what_is_dropped_on_it(tab: Page):
    sent = []
    tab.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    unfold(tab)
    drop(tab, "[data-option=init_image] .slot", plain_png())
    expect(thumbnail(tab, "init_image")).to_be_visible()
    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"}
    field(tab, "init_image").set_input_files(files=[text])
    expect(tab.locator("#option-init_image-error")).to_have_text("notes.txt is no PNG, JPEG or WebP.")
    assert sent == []  # not read for settings


def begin(tab: Page, data: bytes) -> None:
    """Open the editor of a mask over an image."""
    unfold(tab)
    drop(tab, "[data-option=init_image] .slot", data)
    expect(thumbnail(tab, "init_image")).to_be_visible()
    tab.locator("#draw-mask").click()
    expect(tab.locator("#mask-editor canvas")).to_be_focused()


def stroke(tab: Page, *points: Point) -> None:
    """Drag through points, in pixels of an image of 128."""
    box = tab.locator("#mask-editor canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"] / 128, box["y"] + y * box["height"] / 128) for x, y in points]
    tab.mouse.move(*places[0])
    tab.mouse.down()
    for place in places[1:]:
        tab.mouse.move(*place, steps=5)
    tab.mouse.up()


def marked(tab: Page, *points: tuple[int, int]) -> list[bool]:
    """Whether the editor's mask covers pixels."""
    script = (
        "(canvas, points) => points.map(([x, y]) => canvas.getContext('2d').getImageData(x, y, 1, 1).data[3] > 127)"
    )
    return tab.locator("#mask-editor canvas").evaluate(script, [list(point) for point in points])


def brush(tab: Page, size: int) -> None:
    tab.locator("#brush-size").fill(str(size))


def test_tools_of_the_mask(tab: Page):
    """Brush, its size, eraser, undo, invert, clear; the mask is what they left."""
    begin(tab, plain_png())
    tools = {name: tab.get_by_role("button", name=name, exact=True) for name in ("Eraser", "Undo", "Invert", "Clear")}
    left, middle, far, beside = (32, 32), (64, 32), (64, 100), (32, 45)
    expect(tools["Undo"]).to_be_disabled()
    brush(tab, 16)
    stroke(tab, (24, 32), (100, 32))
    assert marked(tab, left, middle, far, beside) == [True, True, False, False]
    tools["Eraser"].click()
    stroke(tab, (64, 10), (64, 60))
    assert marked(tab, left, middle, far) == [True, False, False]
    tools["Undo"].click()
    assert marked(tab, left, middle, far) == [True, True, False]
    tools["Eraser"].click()
    brush(tab, 48)
    stroke(tab, (24, 32))
    assert marked(tab, beside, far) == [True, False]
    tools["Invert"].click()
    assert marked(tab, left, beside, far) == [False, False, True]
    tools["Clear"].click()
    assert marked(tab, left, middle, far) == [False, False, False]
    tab.keyboard.press("Control+z")
    tab.keyboard.press("Control+z")
    tab.keyboard.press("Control+z")
    assert marked(tab, left, middle, beside, far) == [True, True, False, False]
    tab.get_by_role("button", name="Done").click()
    mask = thumbnail_pixels(tab, "mask")
    assert mask.shape == (128, 128, 3)
    assert set(np.unique(mask)) == {0, 255}
    assert (mask[32, 24:100] == 255).all()
    assert (mask[:22] == 0).all()
    assert (mask[42:] == 0).all()


def test_a_mask_is_gone_on_with_left_and_dropped(tab: Page):
    """Opened again it is there; cancelled it stays; another init image takes it away."""
    begin(tab, plain_png())
    brush(tab, 16)
    stroke(tab, (30, 30), (60, 30))
    tab.get_by_role("button", name="Done").click()
    first = thumbnail(tab, "mask").get_attribute("src")
    tab.locator("#draw-mask").click()
    assert marked(tab, (40, 30), (40, 90)) == [True, False]
    stroke(tab, (30, 90), (60, 90))
    tab.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(thumbnail(tab, "mask")).to_have_attribute("src", first or "")
    drop(tab, "[data-option=init_image] .slot", plain_png(100))
    expect(thumbnail(tab, "mask")).to_be_hidden()


def test_a_mask_needs_an_image(tab: Page):
    unfold(tab)
    tab.locator("#draw-mask").click()
    expect(tab.locator("#option-mask-error")).to_contain_text("Choose an init image first")


def test_inpainting_keeps_what_is_not_masked(tab: Page, address: str):
    """To the bit; within the mask the image is another."""
    job = generate(tab, prompt="red heart", steps=20, seed=3)
    tile(tab, job).click()
    tab.locator("[data-act=init]").click()
    expect(thumbnail(tab, "init_image")).to_be_visible()
    np.testing.assert_array_equal(thumbnail_pixels(tab, "init_image"), pixels(read_bytes(address, job)))
    tab.locator("#draw-mask").click()
    brush(tab, 50)
    stroke(tab, (64, 50), (64, 90))
    tab.get_by_role("button", name="Done").click()
    expect(thumbnail(tab, "mask")).to_be_visible()
    write(tab, prompt="blue heart", strength=0.9)
    sent, again = posted(tab, tab.locator("#generate").click)
    expect(tile(tab, again)).to_be_visible()
    mask = decoded(sent["options"]["mask"])[..., 0] == 255
    before, after = (pixels(read_bytes(address, one)).astype(int) for one in (job, again))
    assert 1000 < mask.sum() < 8000
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert np.abs(after - before)[mask].mean() > 5
    tile(tab, again).click()
    tab.locator("#reset").evaluate("button => button.click()")
    tab.locator("[data-act=use]").click()  # images come back, too, in the tab that sent them
    assert thumbnail_pixels(tab, "mask")[..., 0].tolist() == (mask * 255).tolist()
    expect(field(tab, "strength")).to_have_value("0.9")


def test_strengths_of_loras_and_hints_of_controlnets(new_context: Callable[..., BrowserContext]):
    lora, net = "checkpoints/openmoji_recolour/kohya.safetensors", "checkpoints/openmoji_lineart"
    with serving("--batch", "1", "--sizes", "none", "--lora", lora, "--controlnet", net) as address:
        page = new_context().new_page()
        errors = watch(visit(page, address))
        facts = ask(address, "v1/options")
        unfold(page)
        strengths = page.locator("[data-option=lora_scale]")
        strengths.get_by_label(facts["loras"][0]).fill("0.5")
        drop(page, "[data-option=control_image] .slot", plain_png())
        expect(thumbnail(page, "control_image")).to_be_visible()
        write(page, prompt="red heart", steps=2, control_from="invert", control_scale=0.7)
        sent, job = posted(page, page.locator("#generate").click)
        assert decoded(sent["options"]["control_image"]).min() == 255
        expect(tile(page, job)).to_be_visible()
        settings = ask(address, f"v1/jobs/{job['id']}")["images"][0]["settings"]
        assert [settings[name] for name in ("lora_scale", "control_from", "control_scale")] == [0.5, "invert", 0.7]
        assert errors == []
