"""Files that are there whole or not at all, whatever ends their writing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import full_disk

from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write, cannot_write, check_writable, recover, write_bytes, write_text

OLD, NEW = b"old" * 1000, b"new" * 2000


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "deep" / "x.bin"
    for content in (OLD, NEW):
        write_bytes(path, content)
        assert path.read_bytes() == content
    write_text(path, "旗\n")
    assert path.read_bytes() == "旗\n".encode()
    assert names(tmp_path) == ["deep", "deep/x.bin"]


@pytest.mark.parametrize("before", [None, OLD])
def test_a_full_disk_leaves_what_was_there(before, tmp_path):
    path = tmp_path / "x.bin"
    if before is not None:
        path.write_bytes(before)
    message = r"cannot write .*/x\.bin: File too large; make room and run the same command again"
    with full_disk(4096), pytest.raises(UserError, match=message):
        write_bytes(path, NEW)
    assert names(tmp_path) == ([] if before is None else ["x.bin"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; make room and run the same command again"),
        (errno.EACCES, "Permission denied; choose a place that you may write"),
        (errno.EROFS, "Read-only file system; choose a place that you may write"),
        (errno.ENOTDIR, "Not a directory; choose another place"),
    ],
)
def test_each_failure_says_what_to_do(number, advice):
    assert str(cannot_write("x.png", OSError(number, os.strerror(number)))) == f"cannot write x.png: {advice}"


def test_a_folder_is_replaced_and_keeps_the_rest(tmp_path):
    path = tmp_path / "model"

    def write(content: bytes, *more: bytes) -> None:
        with atomic_write(path) as partial:
            (partial / "unet").mkdir(parents=True)
            (partial / "unet" / "weights").write_bytes(content)
            assert not more

    for content in (OLD, NEW):
        write(content)
        (path / "card.md").write_text("mine")
    assert names(tmp_path) == ["model", "model/card.md", "model/unet", "model/unet/weights"]
    assert (path / "unet" / "weights").read_bytes() == NEW
    with pytest.raises(AssertionError):
        write(OLD, b"fails")
    assert (path / "unet" / "weights").read_bytes() == NEW
    assert names(tmp_path) == ["model", "model/card.md", "model/unet", "model/unet/weights"]


KILLED = """
import os, sys
from pathlib import Path
from sdjax.core.files import atomic_write
rename, left = Path.rename, [int(sys.argv[2])]
def killed(self, target):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return rename(self, target)
Path.rename = killed
with atomic_write(sys.argv[1]) as partial:
    partial.mkdir()
    (partial / "weights").write_bytes(b"new")
    (partial / "config").write_bytes(b"new")
"""


@pytest.mark.parametrize("renames", range(3))
def test_what_was_killed_is_recovered(renames, tmp_path):
    """A process dies before each rename of a folder's replacement: the folder is the old one or the new one, whole."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("weights", "config", "card.md"):
        (path / name).write_bytes(b"old")
    (tmp_path / ".other.1@elsewhere.partial").touch()
    mine = tmp_path / f".model.{os.getpid()}@{os.uname().nodename}.partial"
    mine.touch()
    killed = subprocess.run([sys.executable, "-c", KILLED, path, str(renames)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9
    recover(tmp_path, {"another"})
    recover(tmp_path, {"model"})
    assert mine.exists(), "its process lives"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [mine.name, ".other.1@elsewhere.partial", "model"]
    made = b"new" if renames == 2 else b"old"
    found = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    assert found == {"weights": made, "config": made, "card.md": b"old"}


def test_a_place_is_checked_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert names(tmp_path) == ["new", "new/folder"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/x: Not a directory; choose another place"):
        check_writable(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="cannot write /proc/sdjax: No such file or directory; choose another place"):
        check_writable("/proc/sdjax")
