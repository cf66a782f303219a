"""The formats of files, told by how they begin: a name's suffix is a guess, and failed downloads leave text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sdjax.core.errors import UserError
from sdjax.core.untrusted import check_ordinary

LENGTH = 200  # bytes that are looked at
PICKLES = (b"PK\x03\x04", b"\x80")  # torch's archives, and what it wrote before 1.6
LFS = b"version https://git-lfs"
OTHERS = {
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"RIFF": "a WebP image",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
}


def format_of(path: Path) -> Literal["safetensors", "pickle", ""]:
    """The format in which a file begins; "" for one that is too short or damaged to tell.

    Raises:
        UserError: it cannot be read, or begins as a file that holds no weights, which is named.
    """
    check_ordinary(path)
    try:
        with path.open("rb") as file:
            head = file.read(LENGTH)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if head[4:9] == b"\0\0\0\0{":  # the end of a header's length, and the header
        return "safetensors"
    if head.startswith(PICKLES):
        return "pickle"
    if head.startswith(LFS):
        raise UserError(f"{path} is a Git LFS pointer in the place of the file; git lfs pull fetches it")
    for start, name in OTHERS.items():
        if head.startswith(start):
            raise UserError(f"{path} holds no weights: it is {name}")
    text = _text(head)
    if text.startswith("<"):
        raise UserError(f"{path} is an HTML or XML page, as a failed download leaves it; download the file again")
    if text:
        raise UserError(f"{path} is text, as a failed download leaves it, that begins {text[:60]!r}")
    return ""


def _text(head: bytes) -> str:
    """The first line of a text; "" for other bytes."""
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < LENGTH else "ignore").strip()
    except UnicodeDecodeError:
        return ""
    return text.partition("\n")[0] if all(c.isprintable() or c.isspace() for c in text) else ""
