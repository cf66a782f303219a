"""Large sets stay cheap, and files that somebody else made do no harm."""

import gc
import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.sources import tar_index
from sdjax.data.sources.open import source


def picture():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


def held(make):
    """What `make` returns, and the bytes of Python and NumPy objects that it keeps."""
    make()
    gc.collect()
    tracemalloc.start()
    try:
        kept = make()
        gc.collect()
        return kept, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_folder_keeps_16_bytes_a_row(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    rows = [json.dumps({"file_name": "a.png", "text": f"a caption of some length, number {i}"}) for i in range(10_000)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    examples, size = held(lambda: source(f"folder:{tmp_path}"))
    assert examples[9_876]["caption"].endswith("number 9876")
    assert size < 20 * 10_000


def test_tar_shards_keep_60_bytes_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = picture()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in range(3_000):
            for kind, content in (("png", data), ("txt", b"number %d" % row)):
                info = tarfile.TarInfo(f"{row:09d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    examples, size = held(lambda: source(f"webdataset:{tmp_path}/a.tar"))
    assert examples[2_345]["caption"] == "number 2345"
    assert size < 60 * 3_000 + 64_000  # what does not depend on the rows


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damaged_tars_are_indexed_or_refused(tmp_path, monkeypatch, form):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, rng = tmp_path / "a.tar", np.random.default_rng(0)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in (
            ("x" * 120 + ".png", picture()),
            ("x" * 120 + ".txt", b"long"),
            ("ä.png", b"no"),
            ("ä.txt", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = path.read_bytes()
    outcomes, errors = set(), []
    for _ in range(400):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, min(len(data), 6000), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        index = tar_index.build(path)
        assert (index.spans[:, ::2] + index.spans[:, 1::2] <= len(data)).all()
        try:
            outcomes.add(len(source(f"webdataset:{path}")))
        except UserError as error:
            errors.append(str(error))
    assert errors
    assert outcomes
    assert all(str(path) in error and "\n" not in error for error in errors)
