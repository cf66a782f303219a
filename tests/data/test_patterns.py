"""What patterns of shards name, as a shell would."""

import pytest

from sdjax.core.errors import UserError
from sdjax.data.sources.shard_globs import files


def test_patterns(tmp_path):
    for name in ("x08.tar", "x09.tar", "x10.tar", "y1.tar", "odd{1}.tar"):
        (tmp_path / name).touch()

    def found(pattern):
        return [path.name for path in files(pattern)]

    assert found(f"{tmp_path}/x{{08..10}}.tar") == ["x08.tar", "x09.tar", "x10.tar"]
    assert found(f"{tmp_path}/{{y1,x09}}.tar,{tmp_path}/x1?.tar") == ["y1.tar", "x09.tar", "x10.tar"]
    assert found(f"{tmp_path}/[xy]*.tar") == ["x08.tar", "x09.tar", "x10.tar", "y1.tar"]
    assert found(f"{tmp_path}/x{{10..11}}.tar,{tmp_path}/z*.tar") == ["x10.tar", "x11.tar", "z*.tar"]  # a source tells
    for pattern, said in [
        ("x{9..8}.tar", "must count upwards"),
        ("x{0..99999999999}.tar", "at most 1000000 files"),
        ("{0..9999}{0..9999}", "more than 1000000 files"),
        ("{one}.tar", "no range"),
        ("", r"names the folder .*; did you mean the files in it, .*/\*\?"),
    ]:
        with pytest.raises(UserError, match=said):
            files(f"{tmp_path}/{pattern}")
    with pytest.raises(UserError, match=r"x08\.tar twice"):
        files(f"{tmp_path}/x08.tar,{tmp_path}/x*.tar")
