"""The form of the page: fields are the server's table of options, and errors stand beside them."""

from __future__ import annotations

import pytest
from page_driver import ask, field, generate, tile, unfold, write
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow


def test_every_option_of_the_server_is_a_field(tab: Page, address: str):
    """Bounds, default, choices and help are those of the table."""
    facts = ask(address, "v1/options")
    found = tab.locator("[data-option]").evaluate_all("nodes => nodes.map(node => node.dataset.option)")
    assert sorted(found) == sorted({"prompt", "negative_prompt", *(row["name"] for row in facts["options"])})
    for row in (row for row in facts["options"] if row["name"] != "negative_prompt"):
        entry = field(tab, row["name"])
        if row["kind"] in ("int", "float"):
            bounds = [entry.get_attribute(name) for name in ("min", "max")]
            wanted = [None if bound is None else float(bound) for bound in (row["least"], row["most"])]
            assert [None if text is None else float(text) for text in bounds] == wanted, row
            if row["default"] is not None:
                assert entry.get_attribute("placeholder") == f"{row['default']:g}"
        if row["choices"]:
            choices = entry.locator("option").evaluate_all("all => all.map(one => one.value)")
            assert choices == ["", *row["choices"]]
        assert row["help"] in (tab.locator(f"#option-{row['name']}-help").text_content() or "")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("steps", "0", "at least 1"), ("width", "131", "not a multiple of"), ("strength", "0.5", "without an init_image")],
)
def test_an_error_stands_beside_its_field(tab: Page, name: str, value: str, words: str):
    """Also within a section that was folded; it goes with the next change."""
    unfold(tab)
    write(tab, prompt="red heart", **{name: value})
    unfold(tab, False)
    tab.locator("#generate").click()
    error = tab.locator(f"#option-{name}-error")
    expect(error).to_contain_text(words)
    expect(error).to_be_visible()
    expect(field(tab, name)).to_be_focused()
    expect(field(tab, name)).to_have_attribute("aria-invalid", "true")
    assert f"option-{name}-error" in (field(tab, name).get_attribute("aria-describedby") or "")
    field(tab, name).fill("")
    expect(error).to_be_hidden()
    expect(field(tab, name)).to_have_attribute("aria-invalid", "false")


def test_text_that_is_no_number_is_not_sent(tab: Page):
    sent = []
    tab.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    field(tab, "steps").press_sequentially("1e")
    tab.locator("#generate").click()
    expect(tab.locator("#option-steps-error")).to_have_text("Enter an integer, at least 1.")
    assert sent == []


def test_a_full_queue_and_a_server_that_is_gone_are_said(tab: Page):
    full = {"status": 503, "headers": {"Retry-After": "7"}, "json": {"detail": "the queue is full"}}
    tab.route("**/v1/jobs", lambda route: route.fulfill(**full))
    tab.locator("#generate").click()
    expect(tab.locator("#form-message")).to_have_text("the queue is full. Try again in 7 s.")
    tab.route("**/v1/jobs*", lambda route: route.abort())
    expect(tab.locator("#banner")).to_have_text("The server does not answer.")
    tab.unroute_all()
    expect(tab.locator("#banner")).to_be_hidden()


def test_a_fold_says_how_many_of_its_options_are_set(tab: Page):
    unfold(tab)
    badge = tab.locator("#section-more .badge")
    expect(badge).to_have_text("")
    write(tab, clip_skip=1)
    expect(badge).to_have_text("1 option set")
    write(tab, clip_skip="", guidance_rescale=0.5, tile=0)
    expect(badge).to_have_text("2 options set")


def test_a_reload_keeps_form_and_images(tab: Page):
    job = generate(tab, prompt="red heart", steps=2, num_images=2)
    tile(tab, job, 1).click()
    tab.locator("[data-act=init]").click()
    init = tab.locator("[data-option=init_image] img")
    expect(init).to_be_visible()
    write(tab, negative_prompt="blue", strength=0.4)
    before = init.get_attribute("src") or ""
    tab.reload()
    expect(field(tab, "prompt")).to_have_value("red heart")
    expect(field(tab, "negative_prompt")).to_have_value("blue")
    expect(field(tab, "strength")).to_have_value("0.4")
    expect(init).to_have_attribute("src", before)
    expect(tile(tab, job, 1)).to_be_visible()
    tab.get_by_role("button", name="Reset").click()
    expect(field(tab, "strength")).to_have_value("")
    expect(init).to_be_hidden()
    tab.get_by_role("button", name="Undo").click()
    expect(field(tab, "strength")).to_have_value("0.4")
    expect(init).to_have_attribute("src", before)
    tab.get_by_role("button", name="Reset").click()
    tab.reload()
    expect(field(tab, "steps")).to_be_visible()
    expect(field(tab, "prompt")).to_have_value("")


def test_the_seed_of_the_newest_image_is_reused(tab: Page, address: str):
    job = generate(tab, prompt="red heart", steps=1)
    expect(tile(tab, job)).to_be_visible()
    tab.get_by_role("button", name="Reuse").click()
    seed = ask(address, f"v1/jobs/{job['id']}")["images"][0]["settings"]["seed"]
    expect(field(tab, "seed")).to_have_value(str(seed))
    tab.get_by_role("button", name="Random").click()
    expect(field(tab, "seed")).to_have_value("")


def test_an_empty_seed_is_drawn(tab: Page, address: str):
    jobs = [generate(tab, prompt="red heart", steps=1) for _ in range(2)]
    for job in jobs:
        expect(tile(tab, job)).to_be_visible()
    seeds = [ask(address, f"v1/jobs/{job['id']}")["images"][0]["settings"]["seed"] for job in jobs]
    assert seeds[0] != seeds[1]


def test_width_and_height_are_swapped(tab: Page):
    write(tab, width=64)
    tab.get_by_role("button", name="Swap width and height").click()
    expect(field(tab, "height")).to_have_value("64")
    expect(field(tab, "width")).to_have_value("")
