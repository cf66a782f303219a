"""Images of untrusted files: each is read, upright, or refused in one line."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.images import image_size, read_image, read_labels
from sdjax.data.sources.rules import RowRules
from sdjax.data.sources.validate import check

# What Pillow says of damaged metadata that it can do without.
WARNINGS = ("Corrupt EXIF data", "Metadata Warning", "Truncated File", "Tag data larger")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in WARNINGS]
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
TAGS = {0x010E: "a description", 0x0112: 6, 0x011A: 72.5, 0x8769: {0x9000: b"0230", 0x829A: 0.01}}


def with_exif(form: str) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    for tag, value in TAGS.items():
        exif[tag] = value
    Image.fromarray(PICTURE).save(file, form, exif=exif)
    return file.getvalue()


def mistyped(data: bytes) -> list[bytes]:
    """The file with each of EXIF's 13 types, and one that there is not, for each entry of its first directory."""
    start, order = next((data.index(mark), mark[:1]) for mark in (b"II*\0", b"MM\0*") if mark in data)
    order = {b"I": "<", b"M": ">"}[order]
    (first,) = struct.unpack_from(f"{order}I", data, start + 4)
    (count,) = struct.unpack_from(f"{order}H", data, start + first)
    made = []
    for entry in range(count):
        for kind in range(1, 15):
            changed = bytearray(data)
            struct.pack_into(f"{order}H", changed, start + first + 2 + 12 * entry + 2, kind)
            made.append(bytes(changed))
    return made


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_mistyped_exif_is_read_or_one_line(form):
    whole = with_exif(form)
    assert read_image(whole).shape == (6, 8, 3)
    assert image_size(whole) == (6, 8)
    read, refused = 0, []
    for data in mistyped(whole):
        for reader in (read_image, image_size):
            try:
                reader(data)
                read += 1
            except UserError as error:
                refused.append(str(error))
        with pytest.raises(UserError):
            read_labels(data, (8, 6))
    assert read > 60, "most have another fault than one that matters"
    assert len(refused) > 3
    assert set(refused) == {"cannot read image a record: it is damaged"}


def test_a_hostile_file_is_one_row_of_the_list(tmp_path):
    (tmp_path / "good.jpg").write_bytes(with_exif("JPEG"))
    lines = [json.dumps({"file_name": "good.jpg", "text": "good"})]
    for i, data in enumerate(mistyped(with_exif("JPEG"))):
        (tmp_path / f"{i}.jpg").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": "mistyped"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = list(check(f"folder:{tmp_path}", rules=RowRules(minimum_side=1)))
    assert 3 < len(found) < len(lines) // 2
    assert all("cannot read image" in bad.reason for bad in found)
    assert not any(bad.place.endswith(" line 1") for bad in found)
