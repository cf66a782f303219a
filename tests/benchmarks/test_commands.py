"""Flags that do not fit are one line, rows find their table, and a mesh shards what is sampled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import sampling, training
from benchmarks.results import RESULTS, append, utilisation
from sdjax.core.errors import UserError

AUTOENCODER = "--config=configs/openmoji.py:autoencoder_tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scaling", "medium"], "unknown scaling 'medium' in --scaling; choose one of: strong, weak"),
        (["--devices", "4"], "--devices goes with --mesh or --scaling"),
        (["--against", "diffusers", "--mesh", "data=2"], "leave --mesh and --scaling out"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_sampling_refuses(words, message):
    with pytest.raises(UserError) as refused:
        sampling.read_command_line(["sampling", "--variant", "sd15", *words])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config is required"),
        ([AUTOENCODER, "--data", "rael"], "unknown data 'rael' in --data; choose one of: real, synthetic"),
        ([AUTOENCODER, "--mesh", "fspd=2"], "unknown mesh axis 'fspd'"),
        ([AUTOENCODER, "--mesh", "data=1", "--batch_size", "0"], "--batch_size"),
        (["--config=configs/openmoji.py", "--data", "real"], "has to be a trained one's folder"),
        (["--config=configs/stable_diffusion.py"], "it has no training part"),
    ],
)
def test_training_refuses(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["training", *words])
    with pytest.raises(UserError) as refused:
        training.main()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_utilisation_is_of_published_peak():
    """Two H100 have 2 x 989.4 TFLOP/s in bfloat16; of what is not published nothing is said."""
    cards: Any = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 2
    assert utilisation(989.4e12, "bfloat16", cards) == "989 (50.0%)"
    assert utilisation(989.4e12, "float32", cards) == "989"
    assert utilisation(1e12, "bfloat16", [SimpleNamespace(device_kind="cpu")]) == "1"


def test_a_row_goes_to_the_table_with_its_columns(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Two\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nBetween.\n\n| a | c |\n| --- | --- |\n\nEnd.\n")
    append({"a": "3", "b": "4|5"}, path)
    append({"a": "6", "c": "7"}, path)
    assert path.read_text() == (
        "# Two\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4\\|5 |\n\nBetween.\n\n"
        "| a | c |\n| --- | --- |\n| 6 | 7 |\n\nEnd.\n"
    )
    with pytest.raises(UserError, match="has no table with the columns a, d"):
        append({"a": "8", "d": "9"}, path)


@pytest.fixture(scope="module")
def found():
    """What on_two_devices.py prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("on_two_devices.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "PYTHONPATH": str(RESULTS.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_shards_and_bytes_by_hand(found):
    """Each of two devices holds half of every large array, and sends that half once for the other to gather."""
    assert found["on_one_device"] == found["whole"] + found["split"] // 2
    assert found["split"] > 0.8 * (found["whole"] + found["split"])
    assert found["sent"] == {"all-gather": found["split"] // 2}


def test_scaling_shares_or_multiplies_the_batch(found):
    assert found["weak"] == [["data=1", 2], ["fsdp=2", 4]]
    assert found["strong"] == [["data=1", 2], ["fsdp=2", 2]]
    assert "with one axis that grows" in found["fixed"]


def test_a_batch_that_devices_cannot_share_is_refused(found):
    assert "on fsdp=2, --batch=3 is not divisible by the 2 devices" in found["uneven"]


def test_scaling_efficiency(found):
    """4 images in 2 s by one device, 8 in 5 s by two: 2 and 0.8 images/s a device."""
    assert [row["efficiency"] for row in found["rows"]] == ["100.0%", "40.0%"]
    assert [row["images/s"] for row in found["rows"]] == ["2", "1.6"]
    assert [row["all-reduce, B"] for row in found["rows"]] == ["0", "1,234"]
