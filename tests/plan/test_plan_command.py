"""What a user can get wrong is one line before anything is compiled; a search ranks what fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.openmoji import get_config
from sdjax.core.errors import UserError
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.plan.__main__ import read_command_line
from sdjax.plan.chips import CHIPS, GIB, Chip, chip_of
from sdjax.plan.plans import Plan, PlannedProgram
from sdjax.plan.programs import Figures, Flops, Memory, Refused
from sdjax.plan.report import Heading, search_report, verdict
from sdjax.plan.roofline import Estimate
from sdjax.plan.search import Candidate, candidates, search
from sdjax.plan.topology import Target, find_target
from sdjax.plan.training import training_programs
from sdjax.plan.variants import shaped

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("data=2,fsdp=8", {"data": 2, "fsdp": 8}), (" tensor = 4 ", {"tensor": 4}), ("data=-1", {"data": -1})],
)
def test_meshes_are_read(text: str, sizes: dict[str, int]):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model=2", "unknown mesh axis 'model'"),
        ("data=2,data=4", "names the axis data twice"),
        ("data=0", "1 or more"),
        ("data=two", "1 or more"),
        ("", "written as data=2,fsdp=8"),
    ],
)
def test_wrong_meshes_are_refused(text: str, said: str):
    with pytest.raises(UserError, match=said):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v7x:2x2", "unknown topology 'v7x:2x2'"),
        ("v5e:2", "have 2 dimensions, e.g. v5e:2x4"),
        ("v5p:2x2", "have 3 dimensions, e.g. v5p:2x2x4"),
        ("v5e:2xa", "have 2 dimensions"),
        ("cpu:none", "wants a number"),
    ],
)
def test_wrong_topologies_are_refused(topology: str, said: str):
    with pytest.raises(UserError, match=said):
        find_target(topology)


def test_without_libtpu_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, which is not installed: pip install -r requirements-tpu\.txt"):
        find_target("v5e:2x4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--topology is required"),
        (["--topology=cpu:2", "--what=fly"], "unknown program 'fly'"),
        (["--topology=cpu:2", "--output=plan.txt"], "ends with .md or .json"),
        (["--topology=cpu:2", "--output=/proc/sdjax/plan.md"], "cannot write /proc/sdjax: No such file"),
        (["--topology=cpu:2", "--search", "--mesh=data=2"], "leave --mesh out"),
        (["--topology=cpu:2", "--batch_sizes=2,4"], "goes with --search"),
    ],
)
def test_wrong_command_lines_are_refused(words: list[str], said: str):
    with pytest.raises(UserError, match=said):
        read_command_line(["plan", *words])


def test_configs_and_models_that_cannot_be_planned():
    mesh = make_mesh({"data": -1})
    config = get_config("autoencoder_tiny")
    config.task.name = ""
    with pytest.raises(UserError, match="no training part"):
        training_programs(config, mesh, 8)
    with pytest.raises(UserError, match="unknown model 'sd9' in --model"):
        shaped("sd9", "bfloat16")


def test_the_command_ends_with_one_line():
    words = [sys.executable, "-m", "sdjax.plan", "--config=configs/openmoji.py:autoencoder_tiny", "--topology=cpu:4"]
    done = subprocess.run([*words, "--mesh=data=3"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the mesh data=3 does not cover the 4 devices")
    assert done.stderr.count("\n") == 1


def test_every_axis_a_search_tries_divides_its_batch():
    found = candidates(16, [8, 64], accumulate=2, most_spatial=2)
    assert all(c.batch_size // 2 % (c.shape[0] * c.shape[1]) == 0 for c in found)
    assert max(c.shape[2] for c in found) == 8, "16-fold tensor splitting is not tried"
    assert max(c.shape[3] for c in found) == 2
    assert found[0] == Candidate((1, 16, 1, 1), 64)
    with pytest.raises(UserError, match="no mesh of 16 devices divides"):
        candidates(16, [3])


CHIP = Chip(100.0, 16, 15, 1000, 400, 2)


def planned(mesh: str, peak: float, seconds: float) -> Plan:
    memory = Memory(int(peak * GIB), 0, 0, 0, 0)
    figures = Figures(memory, Flops(10**12, 10**12, 10**12, 0, 0.0), 0.0, {}, 0, 1.0)
    return Plan(CHIP, 4, mesh, 8, (PlannedProgram("step", 1, figures, Estimate(seconds, 0.0, 0.0)),))


def lacking(mesh: str, needed: float | None) -> Plan:
    refusal = Refused(needed and needed * GIB, 15 * GIB, "RESOURCE_EXHAUSTED: no room")
    return Plan(CHIP, 4, mesh, 8, (PlannedProgram("step", 1, refusal, None),))


def test_search_ranks_plans():
    plans = {1: planned("slow", 10, 2.0), 2: planned("fast", 12, 1.0), 3: lacking("far", 40), 4: lacking("near", 16)}
    plans[5] = planned("over", 15.5, 0.5)
    options = [Candidate((size, 1, 1, 1), 8) for size in (*plans, 6)]
    tried, left = search(options, 5, lambda one: plans[one.shape[0]])
    assert (len(tried), left) == (5, 1)
    target: Any = Target("v5e:2x2", "tpu", [type("D", (), {"device_kind": "TPU v5 lite"})] * 4, CHIP)
    text = search_report(Heading("Search", "python", target), tried, left)
    order = [text.index(f"| {name}") for name in ("fast", "slow", "over", "near", "far")]
    assert order == sorted(order)
    assert "does not fit by 0.50 GiB" in text
    assert "does not fit by 25.00 GiB" in text
    assert "--limit left out 1 more" in text


def test_a_plan_adds_up():
    plan = planned("data=4", 10, 2.0)
    assert plan.speed == 4.0
    assert plan.utilisation == pytest.approx(1e12 / (2.0 * 4 * 100e12))
    assert verdict(plan) == "fits by 5.00 GiB"
    assert verdict(lacking("data=4", None)) == "does not fit"
    assert plan.fits
    assert not lacking("data=4", None).fits


def test_chips_are_told_by_the_longest_name():
    assert chip_of("NVIDIA H100 PCIe").tflops == 756.0
    assert chip_of("NVIDIA H100 80GB HBM3").tflops == 989.4
    assert chip_of("TPU v5 lite").hbm == 16
    assert chip_of("TPU v5").hbm == 95
    assert chip_of("toaster") == Chip()
    names = list(CHIPS)
    for i, name in enumerate(names):
        assert not any(later.startswith(name) for later in names[i + 1 :]), f"{name} hides a later row"


@pytest.mark.slow
def test_a_tpus_compiler_plans_a_tiny_config(tmp_path: Path):
    """It needs libtpu (pip install -r requirements-tpu.txt), and no TPU."""
    output = tmp_path / "plans" / "tiny.json"
    words = [sys.executable, "-m", "sdjax.plan", "--config=configs/openmoji.py:autoencoder_tiny"]
    words += ["--topology=v5e:2x2", "--mesh=fsdp=4", "--config.optim.name=adamw", f"--output={output}"]
    words += ["--config.model.autoencoder.channels=(8, 8)", "--config.task.crop=8", "--config.data.size=8"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    (plan,) = written["plans"]
    (step,) = plan["programs"]
    assert written["device_kind"] == "TPU v5 lite"
    assert 0 < plan["free"] < 15.75 * GIB
    assert step["unknown_loops"] == 0
    assert 0.1 < step["flops"]["device"] * 4 / step["flops"]["model"] < 2.0
    assert plan["seconds"] >= plan["least"] > 0
