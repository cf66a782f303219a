"""Folders into which somebody else could put files are not read from."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdjax.core import caches
from sdjax.core.caches import cache_folder, exposed, own_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three levels, each of this user's alone."""
    made = tmp_path / "a" / "b" / "sdjax"
    made.mkdir(parents=True)
    for path in (made, made.parent, made.parents[1]):
        path.chmod(0o700)
    return made


def test_the_users_own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert exposed(folder) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert own_folder(cache_folder("new"), "things") == folder / "sdjax" / "new"
    assert (folder / "sdjax" / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o777, 0o707, 0o770, 0o720])
def test_a_folder_above_that_others_may_write(folder: Path, level: int, mode: int, caplog: pytest.LogCaptureFixture):
    """They could put another one in the place of what is below it."""
    place = [folder, *folder.parents][level]
    place.chmod(mode)
    caches._is_own_group.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name="users", gr_mem=[]))
        assert exposed(folder) == place
        assert own_folder(folder, "things") is None
        assert own_folder(folder, "things") is None
    assert caplog.text.count("things are not kept") == 1, "once, however many files are asked for"
    assert str(place) in caplog.text
    caches._is_own_group.cache_clear()


def test_what_others_cannot_swap(folder: Path, monkeypatch: pytest.MonkeyPatch):
    folder.parent.chmod(0o1777)  # as /tmp: nobody may rename what is another's
    assert exposed(folder) is None
    folder.chmod(0o1777)
    assert exposed(folder) == folder, "but anybody may add to it"
    folder.chmod(0o770)
    name = pwd.getpwuid(os.getuid()).pw_name
    for members, others in (([], None), ([name], None), ([name, "eve"], folder)):
        caches._is_own_group.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(grp, "getgrgid", lambda number, m=members: SimpleNamespace(gr_name=name, gr_mem=m))
            assert exposed(folder) == others, "a group of one's own is nobody else"
    caches._is_own_group.cache_clear()


def test_links_are_looked_at_on_both_sides(folder: Path, tmp_path: Path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "to").symlink_to(folder.parent)
    assert exposed(tmp_path / "open" / "to" / "sdjax") == tmp_path / "open"
    (tmp_path / "link").symlink_to(folder.parent)
    assert exposed(tmp_path / "link" / "sdjax") is None
    folder.parents[1].chmod(0o777)
    assert exposed(tmp_path / "link" / "sdjax") == folder.parents[1]
    (tmp_path / "last").symlink_to(folder)
    assert exposed(tmp_path / "last") == tmp_path / "last"


def test_a_folder_of_someone_else(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert exposed(folder) == folder
