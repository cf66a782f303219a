"""The page for everyone: on a phone, by keys alone, with a reader of the screen, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from page_driver import (
    PHONE,
    ROOT,
    card,
    field,
    generate,
    posted,
    serving,
    thumbnail,
    thumbnail_pixels,
    tile,
    unfold,
    visit,
    watch,
    write,
)
from playwright.sync_api import BrowserContext, Locator, Page, expect

pytestmark = pytest.mark.slow

PREVIEW = "(card) => card.querySelector('.preview img').naturalWidth > 1"  # of a job's card
FOCUSED = "node => node === document.activeElement"
# The ring of a hidden file input is drawn on the button that stands for it.
RING = "node => getComputedStyle(node.type === 'file' ? node.nextElementSibling : node).outlineStyle"


def scrolls_sideways(page: Page) -> bool:
    return page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) > innerWidth")


def test_a_phone_scrolls_only_down(new_context: Callable[..., BrowserContext], address: str):
    page = new_context(**PHONE).new_page()
    errors = watch(page)
    visit(page, address)
    unfold(page)
    assert page.evaluate("innerWidth") == 390
    assert not scrolls_sideways(page)
    write(page, prompt="a heart " * 30, steps=150)
    running = posted(page, page.locator("#generate").tap)[1]
    expect(card(page, running)).to_contain_text("%")
    assert not scrolls_sideways(page)
    card(page, running).get_by_role("button", name="Cancel").tap()
    write(page, steps=2)
    job = posted(page, page.locator("#generate").tap)[1]
    tile(page, job).tap()
    expect(page.locator("#viewer")).to_be_visible()
    assert not scrolls_sideways(page)
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    assert 0 <= box["x"] < box["x"] + box["width"] <= 390
    page.locator("[data-act=init]").tap()
    expect(thumbnail(page, "init_image")).to_be_visible()
    page.locator("#draw-mask").tap()
    canvas = page.locator("#mask-editor canvas")
    expect(canvas).to_be_visible()
    assert not scrolls_sideways(page)
    canvas.tap()
    page.get_by_role("button", name="Done").tap()
    mask = thumbnail_pixels(page, "mask")[..., 0]
    assert mask[64, 64] == 255
    assert mask[0, 0] == 0
    assert errors == []


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until a control has the focus, which must show."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if target.evaluate(FOCUSED):
            assert target.evaluate(RING) != "none", target
            return
    raise AssertionError(f"Tab does not reach {target}")


def test_keys_alone_do(tab: Page):
    """From the prompt to an image that begins from another, with a mask."""
    tab_to(tab, field(tab, "prompt"))
    tab.keyboard.type("red heart")
    tab_to(tab, field(tab, "steps"))
    tab.keyboard.press("ArrowDown")  # from the model's own
    expect(field(tab, "steps")).to_have_value("24")
    job = posted(tab, lambda: tab.keyboard.press("Control+Enter"))[1]
    expect(tile(tab, job)).to_be_visible()
    tab_to(tab, tile(tab, job))
    tab.keyboard.press("Enter")
    expect(tab.locator("#viewer")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("#viewer")).to_be_hidden()
    expect(tile(tab, job)).to_be_focused()
    tab.keyboard.press("Enter")
    tab_to(tab, tab.locator("[data-act=init]"))
    tab.keyboard.press("Enter")
    expect(field(tab, "init_image")).to_be_focused()
    tab_to(tab, tab.locator("#draw-mask"))
    tab.keyboard.press("Enter")
    expect(tab.locator("#mask-editor canvas")).to_be_focused()
    for key in ("Space", "ArrowRight", "ArrowRight", "Space", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown"):
        tab.keyboard.press(key)
    tab_to(tab, tab.get_by_role("button", name="Done"))
    tab.keyboard.press("Enter")
    expect(tab.locator("#draw-mask")).to_be_focused()
    mask = thumbnail_pixels(tab, "mask")[..., 0]
    assert mask[64, 60:76].min() == 255
    assert mask[64, :50].max() == 0
    assert mask[76:].max() == 0  # where the brush was lifted
    again = posted(tab, lambda: tab.keyboard.press("Control+Enter"))[1]
    expect(tile(tab, again)).to_be_visible()


def test_arrows_turn_to_other_images(tab: Page):
    job = generate(tab, prompt="red heart", steps=1, num_images=2)
    expect(tile(tab, job, 1)).to_be_visible()
    tile(tab, job, 0).click()
    shown = tab.locator("#viewer img")
    expect(shown).to_have_attribute("src", f"v1/jobs/{job['id']}/images/0")
    tab.keyboard.press("ArrowRight")
    expect(shown).to_have_attribute("src", f"v1/jobs/{job['id']}/images/1")
    tab.keyboard.press("Escape")
    expect(tile(tab, job, 1)).to_be_focused()


def test_a_password_and_another_model(new_context: Callable[..., BrowserContext], tmp_path: Path):
    """Events, previews and images come with the password, too; a job names the model that is chosen."""
    secret, other = tmp_path / "secret", tmp_path / "another"
    secret.write_text("me:word")
    secret.chmod(0o600)
    other.symlink_to(ROOT / "checkpoints" / "openmoji")
    models = ("--checkpoint", "checkpoints/openmoji", "--checkpoint", str(other))
    with serving("--batch", "1", "--sizes", "none", "--auth", str(secret), *models) as address:
        stranger = new_context(http_credentials={"username": "me", "password": "wrong"}).new_page()
        answer = stranger.goto(address)
        assert answer is not None
        assert answer.status == 401
        page = visit(new_context(http_credentials={"username": "me", "password": "word"}).new_page(), address)
        expect(page.locator("#model")).to_have_value("openmoji")
        page.locator("#model").select_option("another")
        expect(page.locator("#loading")).to_be_hidden()
        expect(page.locator("#generate")).to_be_enabled()
        write(page, prompt="red heart", steps=40)
        sent, job = posted(page, page.locator("#generate").click)
        assert (sent["model"], job["model"]) == ("another", "another")
        page.wait_for_function(PREVIEW, arg=card(page, job).element_handle())
        expect(tile(page, job).locator("img")).to_have_js_property("naturalWidth", 128)
        page.reload()
        expect(page.locator("#model")).to_have_value("another")
        page.locator("#model").select_option("openmoji")
        tile(page, job).click()
        page.locator("[data-act=use]").click()
        expect(page.locator("#model")).to_have_value("another")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(new_context: Callable[..., BrowserContext], address: str, scheme: Any):
    """On the page with every section open, with errors, jobs and images, and in its dialogs."""
    page = visit(new_context(color_scheme=scheme).new_page(), address)
    faults: dict[str, list[str]] = {}

    def check(place: str) -> None:
        found = Axe().run(page).response["violations"]
        faults[place] = [rule["id"] for rule in found if rule["impact"] in ("serious", "critical")]

    check("start")
    unfold(page)
    done = generate(page, prompt="red heart", steps=2)
    expect(tile(page, done)).to_be_visible()
    running = generate(page, steps=150)
    write(page, steps=0)
    page.locator("#generate").click()
    expect(page.locator("#option-steps-error")).to_be_visible()
    check("running")
    card(page, running).get_by_role("button", name="Cancel").click()
    expect(card(page, running)).to_contain_text("Cancelled")
    check("cancelled")
    tile(page, done).click()
    check("viewer")
    page.locator("[data-act=init]").click()
    expect(thumbnail(page, "init_image")).to_be_visible()
    page.locator("#draw-mask").click()
    check("mask editor")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 245, 241)", "dark": "rgb(18, 20, 22)"}[scheme]
    assert faults == {place: [] for place in ("start", "running", "cancelled", "viewer", "mask editor")}
