"""Every figure of a plan against what is known of the program: bytes, flops, collectives; in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script, output = Path(__file__).with_name("on_four_devices.py"), tmp_path_factory.mktemp("plan") / "tiny.json"
    words = [sys.executable, str(script), str(output)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"printed": done.stderr}


def test_a_collective_in_a_loop_counts_with_every_turn(found: dict[str, Any]):
    """Five turns; each gathers three other quarters of 256 x 256 float32."""
    assert found["gathered_in_a_loop"]["moved"] == {"all-gather": [5, 5 * 3 * 256 * 64 * 4]}


def test_flops_are_those_of_the_products_in_every_turn(found: dict[str, Any]):
    flops = found["gathered_in_a_loop"]["flops"]
    assert flops["model"] == flops["traced"] == 5 * 2 * 64 * 256 * 256
    assert flops["device"] == flops["model"] // 4
    assert flops["reported"] < flops["device"] / 4, "XLA's own count has the loop's body once"


def test_memory_traffic_holds_each_turns_weights(found: dict[str, Any]):
    """A turn writes and reads at least the gathered weight, and no more than a few copies of it."""
    weight = 256 * 256 * 4
    assert 5 * 2 * weight < found["gathered_in_a_loop"]["traffic"] < 5 * 6 * weight


def test_convolution_flops_skip_padding(found: dict[str, Any]):
    forward = 2 * 1 * 8 * 8 * 3 * 3 * 8 * 16
    assert found["convolution"] == {"apply": forward, "gradient": 2 * forward}


def test_donated_and_dropped_arguments(found: dict[str, Any]):
    quarter = 1024 * 1024
    assert found["donated"] == {
        "arguments": quarter,
        "outputs": quarter,
        "temporaries": 0,
        "aliased": quarter,
        "beside": 512 * 512,
    }


def test_arguments_are_the_bytes_that_training_holds(found: dict[str, Any]):
    state = found["state"]
    assert state["specs"] == state["live"]
    assert state["arguments"] == state["live"] + state["batch"]
    assert state["live"] > state["aliased"] > 0.9 * state["live"], "the state is changed in place"


def test_what_cannot_fit_says_by_how_much(found: dict[str, Any]):
    state = found["state"]
    assert state["fits"] is False
    assert state["lacking"] == pytest.approx(state["peak"] - state["usable"])


def test_estimate_is_roofline_plus_communication(found: dict[str, Any]):
    state = found["state"]
    compute, memory, links = state["parts"]
    assert min(compute, memory, links) > 0
    assert state["seconds"] == pytest.approx(max(compute, memory) + links)


def test_the_command_plans_a_config(found: dict[str, Any]):
    plan = found["command"]["plan"]
    (step,) = plan["programs"]
    assert (plan["mesh"], plan["devices"], plan["images"]) == ("fsdp=4", 4, 4)
    assert step["memory"]["arguments"] + step["memory"]["beside"] == found["command"]["specs"]
    assert step["unknown_loops"] == 0
    assert step["flops"]["device"] > 0.1 * step["flops"]["model"] / 4
    assert "all-reduce" in step["moved"], "gradients of devices that see other images are summed"
    assert "| training step |" in found["printed"]
    assert found["command"]["told"].startswith("python -m sdjax.plan --config=")
