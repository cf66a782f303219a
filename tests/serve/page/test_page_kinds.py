"""Options of every kind, as models beside the shipped one have them: what the form makes of them and sends."""

from __future__ import annotations

from typing import Any

import pytest
from page_driver import decoded, drop, field, plain_png, visit, write
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow


def row(name: str, kind: str, **facts: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "help": "", "least": None, "most": None, "choices": [], "default": None} | {
        "many": False,
        **facts,
    }


ROWS = (
    row("steps", "int", least=1),
    row("guess_mode", "bool"),
    row("class_label", "str"),
    row("crop", "pair", least=0),
    row("t2i_scale", "scales"),
    row("layout", "json"),
    row("ip_image", "image", many=True),
    row("lora_scale", "scales"),
    row("control_image", "image", many=True),
    row("control_scale", "scales"),
    row("aesthetic_score", "float"),
)
FACTS = {"model": "openmoji", "inputs": ["class_label"], "default_size": [64, 64], "multiple": 8, "preview": True}
FACTS |= {"options": list(ROWS), "loras": ["first", "second"], "controlnets": 2, "classes": ["hen", "tench"]}


@pytest.fixture
def sent(tab: Page, address: str) -> list[Any]:
    """Requests of the page before such a model; none reaches the server."""
    requests: list[Any] = []

    def take(route: Any) -> None:
        requests.append(route.request.post_data_json)
        route.fulfill(status=503, json={"detail": "taken"})

    tab.route("**/v1/options*", lambda route: route.fulfill(json=FACTS))
    tab.route("**/v1/jobs", take)
    visit(tab, address)
    tab.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
    return requests


def send(tab: Page, sent: list[Any]) -> dict[str, Any]:
    tab.locator("#generate").click()
    expect(tab.locator("#form-message")).to_have_text("taken")
    return sent.pop()


def test_what_is_empty_is_not_sent(tab: Page, sent: list[Any]):
    """The model chooses; one that takes no prompt is given none."""
    assert send(tab, sent) == {"model": "openmoji", "prompt": None, "negative_prompt": None, "options": {}}
    expect(field(tab, "prompt")).to_have_count(0)


def test_values_of_every_kind(tab: Page, sent: list[Any]):
    write(tab, class_label="tench", crop="3, 4", t2i_scale="0.8, 0.5:0.3", aesthetic_score=-1.5)
    write(tab, layout='[{"class": "hen", "box": [0, 0, 1, 1]}]')
    field(tab, "guess_mode").select_option("no")
    for name, value in {"first": "0.5", "second": "-1"}.items():
        tab.locator("[data-option=lora_scale]").get_by_label(name).fill(value)
    expected = {"class_label": "tench", "crop": [3, 4], "t2i_scale": [0.8, [0.5, 0.3]], "aesthetic_score": -1.5}
    expected |= {"layout": [{"class": "hen", "box": [0, 0, 1, 1]}], "guess_mode": False, "lora_scale": [0.5, -1]}
    assert send(tab, sent)["options"] == expected
    assert tab.locator("#option-class_label-list option").evaluate_all("all => all.map((one) => one.value)") == [
        "hen",
        "tench",
    ]


def test_images_of_several_networks_and_of_any_number(tab: Page, sent: list[Any]):
    for place, value in enumerate((10, 20)):
        drop(tab, f"[data-option=control_image] .slot >> nth={place}", plain_png(value))
        drop(tab, f"[data-option=ip_image] .slot >> nth={place}", plain_png(value + 1))
        expect(tab.locator("[data-option=ip_image] .slot")).to_have_count(place + 2)
    options = send(tab, sent)["options"]
    assert [decoded(image)[0, 0, 0] for image in options["control_image"]] == [10, 20]
    assert [decoded(image)[0, 0, 0] for image in options["ip_image"]] == [11, 21]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("crop", "3", "is not two integers"),
        ("t2i_scale", "0.8,,", "is not a number"),
        ("layout", "[", "This is no JSON"),
        ("lora_scale-0", "1", "Enter a number for each, or for none."),
    ],
)
def test_what_is_no_value_is_said(tab: Page, sent: list[Any], name: str, value: str, words: str):
    write(tab, **{name: value})
    tab.locator("#generate").click()
    expect(tab.locator(f"#option-{name.partition('-')[0]}-error")).to_contain_text(words)
    assert sent == []


def test_a_hint_is_for_each_network(tab: Page, sent: list[Any]):
    drop(tab, "[data-option=control_image] .slot >> nth=1", plain_png())
    expect(tab.locator("[data-option=control_image] img").nth(1)).to_be_visible()
    tab.locator("#generate").click()
    expect(tab.locator("#option-control_image-error")).to_have_text("Choose an image for each, or for none.")
    assert sent == []
