"""Small files that anybody may have written: what is no JSON to one reader is none here, and nothing costs much."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from sdjax.core.errors import UserError
from sdjax.core.untrusted import MAX_BYTES, MAX_DEPTH, MAX_YAML, parse_json, read_bytes, read_json, read_text, read_yaml


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1,]", "Expecting value|Illegal trailing comma"),
        (b"\xff", "invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "invalid start byte"),
        ('{"a": 1}'.encode("utf-32-be"), "Expecting value"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "the key 'c' is there twice"),
        (b'{"%s": 1, "%s": 1}' % (b"x" * 5000, b"x" * 5000), "the key 'x{80}' is there twice"),
        (rb'{"\u0061": 1, "a": 2}', "the key 'a' is there twice"),
        (rb'{"a": "\ud83d"}', "surrogates not allowed"),
        (rb'{"\udc00\ud83d": 1}', "surrogates not allowed"),
        (b"\xed\xa0\xbd", "invalid continuation byte"),
        (b'{"a": NaN}', "NaN is no value"),
        (b"[%s]" % (b"7" * 5000), "a number has 5000 digits"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, f"nested more than {MAX_DEPTH} levels"),
        (b"[" * 100_000, f"nested more than {MAX_DEPTH} levels"),
        (b'{"a":' * 100_000, f"nested more than {MAX_DEPTH} levels"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_what_is_not_read(content: bytes, words: str):
    start = time.monotonic()
    with pytest.raises(UserError, match=f"some place is not JSON.*({words})") as error:
        parse_json(content, "some place")
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "content",
    [
        rb'{"a": "\ud83d\ude00", "b": "\\ud83d", "c": "\u00e9"}',
        b'[0, -1, 1.5, 1e-5, -Infinity, 1000000000000000019884624838656, true, null, ""]',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        '\t{"é": [{}, []]}\n'.encode(),
    ],
)
def test_what_is_read_as_python_does(content: bytes):
    assert parse_json(content, "") == json.loads(content)
    assert parse_json(b"\xef\xbb\xbf" + content, "") == json.loads(content), "an editor's mark"


@pytest.mark.parametrize("item", ["[]", "{}", '""', '{"a":0}', "300", "[0]"])
def test_what_is_made_takes_at_most_32_times_the_bytes(item: str):
    content = f"[{','.join([item] * 20_000)}]".encode()
    tracemalloc.start()
    value = parse_json(content, "")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(value) == 20_000
    assert peak < 32 * len(content)


def test_files_that_are_none_are_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    (tmp_path / "list").write_text("[]")
    (tmp_path / "bytes").write_bytes(b"\xff")
    tracemalloc.start()
    for name, words in (
        ("pipe", "no ordinary file"),
        ("large", f"at most {MAX_BYTES}"),
        (".", "no ordinary file"),
        ("absent", "No such file"),
        ("a" * 5000, "name too long"),
        ("a\0b", "null"),
        ("list/a", "Not a directory"),
    ):
        for read in (read_bytes, read_text, read_json):
            with pytest.raises(UserError, match=words):
                read(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(UserError, match="list holds no JSON object"):
        read_json(tmp_path / "list")
    with pytest.raises(UserError, match=r"cannot read .*bytes"):
        read_text(tmp_path / "bytes")


LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (name, name, b", ".join([b"*%c" % (name - 1)] * 9)) for name in range(ord("b"), ord("k"))
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, "it has aliases"),
        (b"a: &a {b: 1}\nc: {<<: *a}\n", "it has aliases"),
        (b"!!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
        (b"!!timestamp a", "is not YAML"),
        (b"!!bool a", "is not YAML"),
        (b"!!int ''", "is not YAML"),
        (b"!!binary a", "is not YAML"),
        (b"2001-99-99", "is not YAML"),
        (b"a: %s" % (b"7" * 5000), "is not YAML"),
        (b"[" * 1000, "is not YAML"),
        (b"{[]: 1}", "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"\x00", "is not YAML"),
        (b"\xff", "cannot read"),
        (b"#" * (MAX_YAML + 1), f"at most {MAX_YAML}"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_yaml_that_is_not_read(content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"x.yaml.*{words}|{words}.*x.yaml") as error:
        read_yaml("x.yaml")
    assert "\n" not in str(error.value)
    assert os.listdir() == ["x.yaml"]


def test_yaml_is_read(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("model: {target: ldm.models.x, params: {timesteps: 1000, betas: [0.1, 1e-4]}}")
    assert read_yaml(tmp_path / "x.yaml")["model"]["params"] == {"timesteps": 1000, "betas": [0.1, "1e-4"]}
