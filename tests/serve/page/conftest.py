"""A server for all tests of the page, and browsers that have never seen it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_driver import LONG, cancel_all, chromium, serving, visit, watch
from playwright.sync_api import Browser, BrowserContext, Page, expect

expect.set_options(timeout=LONG)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a server that makes one image at a time, so that jobs wait for each other."""
    with serving("--batch", "1") as address:
        yield address


@pytest.fixture(scope="module")  # while it is there, no test of the same process may run an event loop of its own
def chrome() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_context(chrome: Browser) -> Iterator[Callable[..., BrowserContext]]:
    contexts = []

    def make(**how: Any) -> BrowserContext:
        context = chrome.new_context(**how)
        context.set_default_timeout(LONG)
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def tab(new_context: Callable[..., BrowserContext], address: str) -> Iterator[Page]:
    """The page in a new browser; its scripts must end without an error."""
    page = new_context().new_page()
    errors = watch(page)
    yield visit(page, address)
    cancel_all(address)
    assert errors == []
