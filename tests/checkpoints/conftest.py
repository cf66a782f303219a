"""What tests of checkpoints share."""

from __future__ import annotations

import sys

import pytest

from sdjax.convert import main


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch):
    """convert(*arguments): the command, in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        main()

    return run
