"""The page for blind comparison, in a browser: sides are shuffled, answers stay, and the tally names the models."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sdjax.eval.side_by_side import Pair, write_page

COUNT = 8
MODELS = [("model", "first/model"), ("against", "<b>second</b>")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of pairs, the first model's images red and the other's blue."""
    root = tmp_path_factory.mktemp("page")
    for name, colour in {"model": "red", "against": "blue"}.items():
        Image.new("RGB", (8, 8), colour).save(root / f"{name}.png")
    sides = [["model.png"], ["against.png"]]
    pairs = [Pair(f"prompt {i} </script><i>", ("Colors", "Text")[i % 2], sides) for i in range(COUNT)]
    write_page(root / "page.html", pairs, MODELS, seed=0)
    return root


@pytest.fixture
def shown(folder):
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((folder / "page.html").as_uri())
        yield page
        assert errors == []
        browser.close()


def test_answers_count_for_the_model_that_was_chosen(shown, tmp_path):
    """Red is always preferred in alignment, never anyone in fidelity: whatever side it stands on."""
    expect(shown.locator("#prompt")).to_have_text("prompt 0 </script><i>")
    sides = set()
    for i in range(COUNT):
        left = shown.locator("#left img").get_attribute("src")
        sides.add(left)
        assert shown.locator("#left img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
        red = "The left ones" if left == "model.png" else "The right ones"
        shown.get_by_role("group").nth(0).get_by_role("button", name=red).click()
        shown.get_by_role("group").nth(1).get_by_role("button", name="No preference").click()
        expect(shown.locator("#place")).to_have_text(f"{i + 1} of {COUNT}; {i + 1} answered")
        if i == 2:
            shown.reload()
            expect(shown.locator("#place")).to_have_text(f"4 of {COUNT}; 3 answered")
        elif i + 1 < COUNT:
            shown.get_by_role("button", name="Next", exact=True).click()
    assert sides == {"model.png", "against.png"}
    shown.locator("#tally summary").click()
    table = shown.locator("#tally table")
    expect(table.locator("tr").first).to_have_text("alignmentmodel: first/modelagainst: <b>second</b>no preference")
    assert table.locator("tr").nth(1).locator("th, td").all_text_contents() == ["all", "8", "0", "0"]
    with shown.expect_download() as download:
        shown.get_by_role("button", name="Download answers").click()
    download.value.save_as(tmp_path / "answers.json")
    saved = json.loads((tmp_path / "answers.json").read_text())
    assert [given["alignment"] for given in saved["answers"]] == ["model"] * COUNT
    assert saved["tally"]["fidelity"]["Text"] == {"model": 0, "against": 0, "tie": COUNT // 2}


def test_the_next_without_an_answer(shown):
    """Both questions are needed for a pair to count."""
    shown.get_by_role("group").nth(0).get_by_role("button", name="The left ones").click()
    expect(shown.locator("#place")).to_have_text(f"1 of {COUNT}; 0 answered")
    shown.get_by_role("button", name="Next", exact=True).click()
    shown.get_by_role("group").nth(0).get_by_role("button", name="The left ones").click()
    shown.get_by_role("group").nth(1).get_by_role("button", name="The left ones").click()
    shown.get_by_role("button", name="Previous").click()
    shown.get_by_role("button", name="Next without an answer").click()
    expect(shown.locator("#place")).to_have_text(f"3 of {COUNT}; 1 answered")


def test_another_seed_shuffles_otherwise(tmp_path):
    pairs = [Pair("a", "b", [["x"], ["y"]])] * 32
    found = []
    for seed in (0, 0, 1):
        write_page(tmp_path / "page.html", pairs, MODELS, seed)
        text = (tmp_path / "page.html").read_text().split('id="data">')[1].split("</script>")[0]
        found.append([pair["left"] for pair in json.loads(text)["pairs"]])
    assert found[0] == found[1] != found[2]
    assert 8 < sum(found[0]) < 24
