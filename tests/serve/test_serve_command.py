"""The command, as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from sdjax.cli.settings.read import read_settings
from sdjax.core.errors import UserError
from sdjax.serve.__main__ import names_of, read_batch, read_command_line, read_models, read_sizes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def process(folder, tmp_path):
    """A server that keeps its images, and its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sdjax.serve", f"--checkpoint={folder}", f"--port={port}", "--sizes=none"]
    command += [f"--outdir={tmp_path / 'kept'}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {}) as started:
        address = f"http://127.0.0.1:{port}"
        while started.poll() is None and not answers(address):
            time.sleep(0.1)
        yield started, address
        started.kill()


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/readyz", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def test_sigterm_finishes_what_runs_and_refuses_what_comes(process, tmp_path):
    """Its client gets the image, which is kept with its settings; the process ends with 0."""
    started, address = process
    options = {"steps": 140, "seed": 3, "height": 16, "width": 16}
    job = requests.post(f"{address}/v1/jobs", json={"prompt": "red heart", "options": options}, timeout=60).json()
    while requests.get(f"{address}/v1/jobs/{job['id']}", timeout=60).json()["state"] == "queued":
        time.sleep(0.02)
    ends = []

    def listen() -> None:
        with requests.get(f"{address}/v1/jobs/{job['id']}/events", stream=True, timeout=120) as events:
            ends.extend(line for line in events.iter_lines(decode_unicode=True) if line.startswith("event"))

    listener = threading.Thread(target=listen)
    with requests.Session() as session:  # whose connection stays open
        session.get(f"{address}/healthz", timeout=60)
        listener.start()
        time.sleep(0.3)
        started.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        try:
            late = session.post(f"{address}/v1/jobs", json={"prompt": "x", "options": options}, timeout=60).status_code
        except requests.ConnectionError:
            late = 503
    assert late == 503
    listener.join(120)
    assert started.wait(120) == 0, started.stderr.read()
    assert ends[-1] == "event: end"
    (image,) = (tmp_path / "kept").glob("*.png")
    assert read_settings(image).values["steps"] == 140
    assert not list((tmp_path / "kept").glob("*.partial*"))


def flags(*words: str):
    return read_command_line(["serve", *words])


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: read_batch("0,4"), "--batch '0,4': choose sizes of at least 1"),
        (lambda: read_batch("a"), "--batch 'a': choose an integer"),
        (lambda: read_sizes("512"), "--sizes '512': choose WIDTHxHEIGHT, several with commas, or none"),
        (lambda: read_models(flags()), r"give --config FILE\.py with a sample\.checkpoint, or --checkpoint SOURCE"),
        (lambda: flags("--portt=1"), "portt"),
    ],
)
def test_mistakes_are_a_line(read, message):
    with pytest.raises(UserError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


def test_what_the_flags_say():
    assert read_batch("4,1,4") == (1, 4)
    assert read_sizes("1024x768, 512x512") == [(768, 1024), (512, 512)]
    assert (read_sizes(None), read_sizes("none")) == (None, [])
    names = names_of(["a/sd15.safetensors", "b/sd15.safetensors", "owner/name@main", "folder/"])
    assert names == ["sd15", "sd15 (2)", "name", "folder"]
