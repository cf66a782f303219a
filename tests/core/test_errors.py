from __future__ import annotations

import io
import os
import sys

import pytest

from sdjax.core.errors import LONGEST, UserError, printable, run_or_exit


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read \ud800.png", r"cannot read \ud800.png"),
        ("a\x1b[2Jb\r\x07\x00", r"a\x1b[2Jb\r\x07\x00"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("two\nlines, é 日本 \U0001f600", "two\nlines, é 日本 \U0001f600"),
        ("x" * 5000 + "\ny", "x" * LONGEST + "...\ny"),
    ],
)
def test_what_others_wrote_is_shown_as_text(text: str, shown: str, capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise UserError(text)

    with pytest.raises(SystemExit) as exited:
        run_or_exit(fail)
    assert exited.value.code == 2
    assert capsys.readouterr().err == f"error: {shown}\n"
    assert printable(UserError(text)) == shown


def test_names_that_are_not_utf8_are_printed(monkeypatch: pytest.MonkeyPatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "utf-8"))
    run_or_exit(lambda: print(os.fsdecode(b"caf\xe9/\xff"), "\ud800 é"))
    sys.stdout.flush()
    assert output.getvalue() == "caf\\udce9/\\udcff \\ud800 é\n".encode()
