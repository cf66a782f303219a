"""The server in a process of its own, Chromium before it (Debian's, or playwright's), and what a person does there."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from children import free_port
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).parents[3]
SECONDS = 300  # until a server is warmed up
LONG = 300_000  # milliseconds until an image is there, whose program may be new
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """Address of a server of the shipped model that has warmed up."""
    port = free_port()
    command = [sys.executable, "-m", "sdjax.serve", "--config", "configs/openmoji.py", "--port", str(port), *flags]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_until_ready(process, address + "readyz")
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(2 * SECONDS):
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(address):
            return
        time.sleep(0.5)
    raise TimeoutError(address)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # which it demands of root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield browser
        browser.close()


def watch(page: Page) -> list[str]:
    """Errors of a page as they come: of its scripts, and of what its policy of content forbids."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if is_fault(message) else None)
    return errors


def is_fault(message: Any) -> bool:
    """False also of an answer with an error, e.g. of a wrong option, which the console alone calls one."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def visit(page: Page, address: str) -> Page:
    """The page once its form is there."""
    page.goto(address)
    page.locator("#option-steps").wait_for()
    return page


def ask(address: str, path: str, method: str = "GET") -> Any:
    with urllib.request.urlopen(urllib.request.Request(address + path, method=method)) as answer:
        return json.load(answer)


def cancel_all(address: str) -> None:
    for job in ask(address, "v1/jobs")["jobs"]:
        if job["state"] in ("queued", "running"):
            ask(address, f"v1/jobs/{job['id']}", "DELETE")


def read_bytes(address: str, job: dict[str, Any], number: int = 0) -> bytes:
    """The file of a finished image."""
    with urllib.request.urlopen(f"{address}v1/jobs/{job['id']}/images/{number}") as answer:
        return answer.read()


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def decoded(data_url: str | None) -> np.ndarray:
    return pixels(base64.b64decode((data_url or "").split(",")[1]))


def thumbnail_pixels(page: Page, name: str) -> np.ndarray:
    """Pixels of the image that an input shows, as soon as it shows one."""
    image = thumbnail(page, name)
    expect(image).to_have_attribute("src", re.compile("^data:image/"))
    return decoded(image.get_attribute("src"))


def field(page: Page, name: str) -> Locator:
    return page.locator(f"#option-{name}")


def thumbnail(page: Page, name: str) -> Locator:
    return page.locator(f"[data-option={name}] img").first


def write(page: Page, **values: Any) -> None:
    for name, value in values.items():
        field(page, name).fill(str(value))


def posted(page: Page, act: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The request for a job that an act sends, and the answer."""
    with page.expect_response(lambda response: response.request.method == "POST") as answer:
        act()
    assert answer.value.status == 201, answer.value.text()
    return answer.value.request.post_data_json, answer.value.json()


def generate(page: Page, **values: Any) -> dict[str, Any]:
    """The job that the server answers with."""
    write(page, **values)
    return posted(page, page.locator("#generate").click)[1]


def card(page: Page, job: dict[str, Any]) -> Locator:
    return page.locator(f"[data-job='{job['id']}']")


def tile(page: Page, job: dict[str, Any], number: int = 0) -> Locator:
    return page.locator(f"[data-image='{job['id']}/{number}'] button")


def unfold(page: Page, is_open: bool = True) -> None:
    """Open all sections of the form, or close them."""
    page.locator("details").evaluate_all("(all, open) => all.forEach((one) => (one.open = open))", is_open)


def drop(page: Page, target: str, data: bytes) -> None:
    """A PNG as the browser's own drag hands it over."""
    script = """(text) => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, base64.b64encode(data).decode())
    for event in ("dragenter", "dragover", "drop"):
        page.locator(target).dispatch_event(event, {"dataTransfer": transfer})


def plain_png(value: int = 255) -> bytes:
    """A grey image without settings."""
    data = io.BytesIO()
    Image.new("RGB", (128, 128), (value, value, value)).save(data, "PNG")
    return data.getvalue()
