"""Which environments make a process one of several, and which command lines are refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from children import free_port
from launching import ROOT

from sdjax.core.errors import UserError
from sdjax.parallel.clusters import choose

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
POD = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "0"}
BATCH_SCRIPT = {name: value for name, value in SLURM.items() if "STEP" not in name}

# name: (environment, on a TPU machine, JAX's method, one process takes all devices of its node)
ENVIRONMENTS = {
    "nothing": ({}, False, None, True),
    "slurm, a task a node": (SLURM, False, "slurm", True),
    "slurm, 4 tasks a node": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"},
        False,
        "slurm",
        False,
    ),
    "slurm, uneven": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, False, "slurm", True),
    "slurm, uneven, the other node": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0"},
        False,
        "slurm",
        False,
    ),
    "slurm, a device bound to each task": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "3"},
        False,
        "slurm",
        True,
    ),
    "slurm, one task": (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False, None, True),
    "slurm, a step of one task in a job of many": (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False, None, True),
    "slurm, the batch script itself": (BATCH_SCRIPT, False, None, True),
    "open mpi": (OPEN_MPI, False, "ompi", False),
    "open mpi, one process": (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False, None, True),
    "open mpi within slurm": (BATCH_SCRIPT | OPEN_MPI, False, "ompi", False),
    "open mpi within a slurm step": (SLURM | OPEN_MPI, False, "ompi", False),
    "a pod": (POD, True, "gketpu", True),
    "a pod's variables without chips": (POD, False, None, True),
    "a pod, on its CPUs": (POD | {"JAX_PLATFORMS": "cpu"}, True, None, True),
    "one host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None, True),
    "one host of many slices": ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, True, "gketpu", True),
    "a TPU virtual machine": ({}, True, "gcetpu", True),
    "one that must not ask": ({"TPU_SKIP_MDS_QUERY": "1"}, True, None, True),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_environment_decides(name):
    environment, on_tpu, method, all_devices = ENVIRONMENTS[name]
    cluster = choose(environment, on_tpu=on_tpu)
    assert (cluster.method, cluster.all_devices) == (method, all_devices)


def test_a_slurm_step_counts_its_own_tasks():
    assert choose(SLURM | {"SLURM_NTASKS": "16"}).processes == 2


def test_flags_win_over_the_environment():
    cluster = choose(SLURM, "[::1]:1234", 3, 2)
    assert cluster[1:5] == ("deactivate", "[::1]:1234", 3, 2)
    assert choose(SLURM, "node0:1234", 1, 0).method is None


REFUSED = {
    "alone": ({}, ("a:1", None, None), "--coordinator without --processes, --process_id: the three go together"),
    "no address": ({}, (None, 2, 0), "--processes, --process_id without --coordinator"),
    "zero is given": ({}, (None, None, 0), "--process_id without --coordinator, --processes"),
    "no port": ({}, ("node0", 2, 0), "--coordinator=node0 is no HOST:PORT"),
    "port": ({}, ("node0:70000", 2, 0), "--coordinator=node0:70000 is no HOST:PORT"),
    "zero port": ({}, ("node0:0", 2, 0), "is no HOST:PORT"),
    "scheme": ({}, ("http://node0:80", 2, 0), "is no HOST:PORT"),
    "beyond": ({}, ("a:1", 2, 2), r"--process_id=2 is not in 0 \.\.\. 1"),
    "negative": ({}, ("a:1", 2, -1), r"--process_id=-1 is not in 0 \.\.\. 1"),
    "none": ({}, ("a:1", 0, 0), "--processes=0: there is one at least"),
    "Open MPI 5": ({"OMPI_COMM_WORLD_SIZE": "2"}, (), r"add --coordinator=HOST:PORT"),
    "no number": (SLURM | {"SLURM_STEP_NUM_TASKS": "two"}, (), "SLURM_STEP_NUM_TASKS='two' in the environment"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_line(case):
    environment, flags, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        choose(environment, *flags)
    assert "\n" not in str(error.value)


CODE = """
import jax, json
from sdjax.parallel.distributed import initialise, sync
initialise(coordinator_timeout=60)
sync("here")
print(json.dumps([jax.process_count(), jax.process_index(), jax.device_count()]))
"""


def loopback(manager: str, process: int) -> dict[str, str]:
    """What a job manager tells the first or the second of two processes on this machine."""
    if manager == "slurm":
        mine = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
        return SLURM | mine | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    mine = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(process)}
    address = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
    return OPEN_MPI | mine | address | {"OMPI_COMM_WORLD_LOCAL_RANK": str(process)}


@pytest.mark.parametrize("manager", ["slurm", "open mpi"])
def test_a_job_manager_is_enough(manager):
    """Two processes with nothing but the variables of a job find each other, by JAX's own reading of them."""
    port = str(free_port())
    common = {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_PORT": port, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env=os.environ | common | loopback(manager, process),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    ends = [process.communicate(timeout=120) for process in pair]
    assert [out.split("\n")[-2] if out else errors for out, errors in ends] == ["[2, 0, 2]", "[2, 1, 2]"]
