"""Who may ask, from where, and how much at a time."""

from __future__ import annotations

import base64
import http.client
import io
import zlib

import pytest
import requests
from listening import listening
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.serve.__main__ import read_access, read_command_line, read_secret
from sdjax.serve.security import LOOPBACK, Access

SECRET = "anna:geheim"


@pytest.fixture(scope="module")
def address(engine):
    with listening(engine) as address:
        yield address


@pytest.fixture(scope="module")
def locked(engine):
    with listening(engine, Access(SECRET, LOOPBACK, ("https://friend.example",), 2**16)) as address:
        yield address


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic"},
        {"Authorization": "Basic " + base64.b64encode(b"anna:falsch").decode()},
        {"Authorization": "Basic %%%"},
        {"Authorization": f"Bearer {SECRET} "[:-2]},
        {"Authorization": "Digest x"},
    ],
)
@pytest.mark.parametrize("path", ["", "v1/jobs", "sdapi/v1/options", "docs", "openapi.json", "metrics"])
def test_without_the_secret_nothing_answers(locked, headers, path):
    answer = requests.get(f"{locked}/{path}", headers=headers, timeout=60)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert answer.json() == {"detail": "authentication is needed"}


def test_with_the_secret_everything_answers(locked):
    for how in ({"auth": tuple(SECRET.split(":"))}, {"headers": {"Authorization": f"Bearer {SECRET}"}}):
        assert requests.get(f"{locked}/v1/jobs", timeout=60, **how).status_code == 200
    assert requests.get(f"{locked}/healthz", timeout=60).status_code == 200


def test_a_name_that_was_made_to_mean_this_machine_is_refused(address):
    answer = requests.get(f"{address}/v1/jobs", headers={"Host": "evil.example"}, timeout=60)
    assert (answer.status_code, answer.json()["detail"]) == (421, "this server is not 'evil.example'")


def test_pages_from_elsewhere_may_not_ask(address, locked):
    for origin in ("https://evil.example", "null", f"{address}.evil.example"):
        answer = requests.post(f"{address}/v1/jobs", json={}, headers={"Origin": origin}, timeout=60)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert requests.get(f"{address}/v1/jobs", headers={"Origin": address}, timeout=60).status_code == 200
    friend = {"Origin": "https://friend.example", "Authorization": f"Bearer {SECRET}"}
    answer = requests.get(f"{locked}/v1/jobs", headers=friend, timeout=60)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"


def test_large_bodies_are_refused_said_or_not(locked):
    known = {"Authorization": f"Bearer {SECRET}"}
    answer = requests.post(f"{locked}/v1/jobs", data=b"x" * 2**17, headers=known, timeout=60)
    assert (answer.status_code, answer.json()["detail"]) == (413, "the request is larger than 65536 bytes")
    parts = (b"x" * 2**12 for _ in range(2**5))  # whose sum is not said
    answer = requests.post(f"{locked}/v1/jobs", data=parts, headers=known, timeout=60)
    assert answer.status_code == 413


def bomb() -> bytes:
    """A PNG of 65,000 x 65,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (65_000).to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def saved(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format=format)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        bomb(),
        saved("GIF"),
        saved("BMP"),
        saved("TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        saved("PNG")[:-30],
        b"<svg/>",
        b"",
    ],
    ids=["gif", "bmp", "tiff", "bomb", "eps", "cut", "svg", "empty"],
)
def test_only_whole_pngs_jpegs_and_webps_are_read(address, data):
    body = {"prompt": "x", "options": {"init_image": base64.b64encode(data).decode()}}
    answer = requests.post(f"{address}/v1/jobs", json=body, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("init_image: ")


def test_files_outside_of_the_page_are_not_served(address):
    host = address.removeprefix("http://")
    for path in (
        "/../engine.py",
        "/%2e%2e/engine.py",
        "/page/../../engine.py",
        "/page/%2e%2e%2fengine.py",
        "//etc/passwd",
    ):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status in (404, 405), path
        assert b"root:" not in answer.read()


def test_answers_forbid_what_is_not_needed(address):
    headers = requests.get(f"{address}/", timeout=60).headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def flags(*words: str):
    return read_command_line(["serve", *words])


def test_another_address_needs_a_secret(tmp_path):
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: other machines could ask; give --auth FILE, too"):
        read_access(flags("--host=0.0.0.0"))
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o644)
    with pytest.raises(UserError, match="other users may read it; chmod 600"):
        read_access(flags("--host=0.0.0.0", f"--auth={file}"))
    file.chmod(0o600)
    access = read_access(flags("--host=0.0.0.0", f"--auth={file}", "--hostname=pictures.example"))
    assert access.secret == SECRET
    assert access.hosts == (*LOOPBACK, "pictures.example")
    file.write_text("\n")
    with pytest.raises(UserError, match="the file is empty; write USER:PASSWORD or a token"):
        read_secret(file)
