"""Screenshots of the page for the documents: PYTHONPATH=tests python tests/serve/page/screenshots.py [docs/images]."""

from __future__ import annotations

import sys
from pathlib import Path

from page_driver import LONG, PHONE, ROOT, card, chromium, generate, serving, tile, visit
from PIL import Image
from playwright.sync_api import Page, expect

PROMPTS = (
    "woman cook: medium skin tone",
    "blue circle",
    "man detective: light skin tone",
    "green heart",
    "grinning face",
    "woman firefighter: medium skin tone",
    "blue heart",
    "woman artist: dark skin tone",
    "red heart",
)
SHOWN = "card => card.querySelector('progress').value > 0.6"
SETTLED = 500  # milliseconds, of what scrolls
LARGE = {"viewport": {"width": 1280, "height": 800}}


def fill(page: Page) -> None:
    """Images in the gallery."""
    for prompt in PROMPTS:
        job = generate(page, prompt=prompt, steps=25, seed=7)
        expect(tile(page, job)).to_be_visible()


def shoot(page: Page, path: Path, prompts: tuple[str, ...]) -> None:
    """The page while the first of some jobs runs, in 256 colours, which makes a third of the bytes."""
    jobs = [generate(page, prompt=prompt, steps=100, seed=7) for prompt in prompts]
    page.wait_for_function(SHOWN, arg=card(page, jobs[0]).element_handle())
    page.wait_for_timeout(SETTLED)
    page.screenshot(path=path, animations="disabled")
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    for job in jobs:
        expect(tile(page, job)).to_be_visible()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    expect.set_options(timeout=LONG)
    folder.mkdir(parents=True, exist_ok=True)
    with serving("--batch", "1") as address, chromium() as browser:
        fill(visit(browser.new_context().new_page(), address))
        for name, how in {"server.png": LARGE, "server-phone.png": PHONE}.items():
            shoot(visit(browser.new_context(**how).new_page(), address), folder / name, ("red heart", "grinning face"))


if __name__ == "__main__":
    main()
