"""Jobs on the page: progress, previews, images, the queue, what is cancelled."""

from __future__ import annotations

import io

import numpy as np
import pytest
from page_driver import ask, card, field, generate, pixels, read_bytes, tile, visit
from PIL import Image
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow

# Of a card.
MOVES = "(card) => { const { value } = card.querySelector('progress'); return value > 0.1 && value < 1 }"
SHOWS = "(card) => card.querySelector('.preview img').naturalWidth > 1"


def test_a_prompt_becomes_an_image(tab: Page, address: str):
    """Progress and preview are seen on the way; the image is the server's, with the settings of the form."""
    job = generate(tab, prompt="red heart", steps=60, seed=7)
    tab.wait_for_function(MOVES, arg=card(tab, job).element_handle())
    tab.wait_for_function(SHOWS, arg=card(tab, job).element_handle())
    assert "%" in tab.title()
    expect(tile(tab, job)).to_be_visible()
    expect(card(tab, job)).to_have_count(0)
    expect(tab.locator("#status")).to_have_text("red heart: Done: 1 image")
    image = ask(address, f"v1/jobs/{job['id']}")["images"][0]
    settings = image["settings"]
    assert (settings["prompt"], settings["steps"], settings["seed"]) == ("red heart", 60, 7)
    seen = tile(tab, job).locator("img")
    assert seen.get_attribute("src") == image["url"].lstrip("/")
    tab.wait_for_function("image => image.naturalWidth === 128", arg=seen.element_handle())
    assert pixels(read_bytes(address, job)).std() > 10
    tile(tab, job).click()
    expect(tab.locator("#viewer dl div", has_text="Seed")).to_contain_text("7")
    with tab.expect_download() as download:
        tab.locator("[data-act=download]").click()
    assert download.value.path().read_bytes() == read_bytes(address, job)
    assert Image.open(io.BytesIO(read_bytes(address, job))).info["parameters"] == image["parameters"]


def test_a_job_is_cancelled(tab: Page, address: str):
    job = generate(tab, prompt="blue heart", steps=150)
    tab.wait_for_function(MOVES, arg=card(tab, job).element_handle())
    card(tab, job).get_by_role("button", name="Cancel blue heart").click()
    expect(card(tab, job)).to_contain_text("Cancelled")
    now = ask(address, f"v1/jobs/{job['id']}")
    assert now["state"] == "cancelled"
    assert 0 < now["done"] < now["total"]
    expect(tile(tab, job)).to_have_count(0)
    stranger = visit(tab.context.new_page(), address)  # who has not seen it run
    expect(stranger.locator("#gallery li, #empty:not([hidden])").first).to_be_visible()
    expect(card(stranger, job)).to_have_count(0)
    card(tab, job).get_by_role("button", name="Dismiss").click()
    expect(card(tab, job)).to_have_count(0)


def test_the_queue_in_three_tabs(tab: Page, address: str):
    """Each sees all jobs and their places; all come to an end."""
    tabs = [tab, *(visit(tab.context.new_page(), address) for _ in range(2))]
    colours = ("red", "green", "blue")
    jobs = [generate(one, prompt=f"{colour} heart", steps=60) for one, colour in zip(tabs, colours, strict=True)]
    for one in tabs:
        expect(card(one, jobs[2])).to_contain_text("Place 2 in the queue")
        expect(card(one, jobs[1])).to_contain_text("Place 1 in the queue")
        expect(card(one, jobs[0])).to_contain_text("%")
    card(tabs[0], jobs[1]).get_by_role("button", name="Cancel").click()  # which another tab has sent
    for one in tabs:
        expect(card(one, jobs[1])).to_contain_text("Cancelled")
        expect(tile(one, jobs[0])).to_be_visible()
        expect(tile(one, jobs[2])).to_be_visible()
    states = [ask(address, f"v1/jobs/{job['id']}")["state"] for job in jobs]
    assert states == ["done", "cancelled", "done"]


def test_six_tabs_leave_connections_to_the_server(tab: Page, address: str):
    """A browser opens six for all of them together, which streams of events would hold while jobs run."""
    tabs = [tab, *(visit(tab.context.new_page(), address) for _ in range(6))]
    jobs = [generate(one, prompt="red heart", steps=150) for one in tabs]
    for one in tabs:
        expect(card(one, jobs[0])).to_contain_text("%")
        answer = one.evaluate("fetch('healthz', { signal: AbortSignal.timeout(5000) }).then((answer) => answer.status)")
        assert answer == 200
    assert ask(address, f"v1/jobs/{jobs[-1]['id']}")["state"] == "queued"


def test_settings_of_an_image_make_it_again(tab: Page, address: str):
    """Also of the second of two, whose noise its index decides."""
    job = generate(tab, prompt="red heart", steps=3, num_images=2, seed=5)
    tile(tab, job, 1).click()
    tab.locator("#reset").evaluate("button => button.click()")
    tab.locator("[data-act=use]").click()
    expect(field(tab, "seed")).to_have_value("5")
    expect(field(tab, "first_index")).to_have_value("1")
    again = generate(tab)
    expect(tile(tab, again)).to_be_visible()
    first, second = (pixels(read_bytes(address, job, number)) for number in (0, 1))
    np.testing.assert_array_equal(pixels(read_bytes(address, again)), second)
    assert np.abs(first.astype(int) - second).mean() > 1


def test_a_failed_job_says_why(tab: Page, address: str):
    job = {"id": "7", "state": "failed", "model": "openmoji", "place": 0, "done": 3, "total": 9, "eta": None}
    job |= {"created": 2e9, "error": "the UNet's output is not finite", "images": [None], "preview": None}
    tab.route("**/v1/jobs?*", lambda route: route.fulfill(json={"jobs": [{**job, "state": "running"}]}))
    expect(card(tab, job)).to_contain_text("33 %")
    tab.route("**/v1/jobs?*", lambda route: route.fulfill(json={"jobs": [job]}))
    expect(card(tab, job)).to_contain_text("Failed: the UNet's output is not finite")
    expect(card(tab, job).locator("progress")).to_be_hidden()


def test_settings_are_copied_as_text(tab: Page, address: str):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    job = generate(tab, prompt="red heart", steps=1)
    tile(tab, job).click()
    tab.locator("[data-act=copy]").click()
    expect(tab.locator("#toast")).to_contain_text("copied")
    image = ask(address, f"v1/jobs/{job['id']}")["images"][0]
    assert tab.evaluate("navigator.clipboard.readText()") == image["parameters"]


def test_images_are_hidden_and_shown_again(tab: Page):
    job = generate(tab, prompt="red heart", steps=1)
    expect(tile(tab, job)).to_be_visible()
    tab.get_by_role("button", name="Hide all").click()
    expect(tab.locator("#gallery li")).to_have_count(0)
    later = generate(tab)
    expect(tile(tab, later)).to_be_visible()
    expect(tile(tab, job)).to_have_count(0)
    tab.get_by_role("button", name="Show hidden").click()
    expect(tile(tab, job)).to_be_visible()
