"""Detection of several processes, by flags or by a job manager's environment variables.

How a job manager tells a process who it is, is JAX's own knowledge (google/jax, jax/_src/clusters); `choose` only
decides whether there is one, and which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from sdjax.core.errors import UserError

FLAGS = ("--coordinator", "--processes", "--process_id")
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


class Cluster(NamedTuple):
    """Coordinates of this process among the others.

    Attributes:
        name: for the log.
        method: JAX's name of the detection that knows the rest; None for one process alone.
        coordinator: HOST:PORT of process 0; None to have it detected, as the two numbers below.
        processes: how many.
        process_id: which.
        all_devices: this process takes every device that it sees. JAX gives one each to the tasks of a job manager,
            which is wrong where a node has a single task or the manager has divided the devices already.
    """

    name: str
    method: str | None = None
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    all_devices: bool = True


ALONE = Cluster("one process")


def choose(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    on_tpu: bool = False,
) -> Cluster:
    """Decides by the flags, else by what a cluster wrote into the environment; Open MPI before SLURM, as JAX does.

    Args:
        environment: variables by name.
        coordinator, processes, process_id: the flags.
        on_tpu: this machine has TPU chips.

    Raises:
        UserError: a flag without the others, an address that is none, a number out of range, a variable that is none.
    """
    given = (coordinator, processes, process_id)
    if any(value is not None for value in given):
        return _by_flags(*given)
    return _open_mpi(environment) or _slurm(environment) or _tpu(environment, on_tpu) or ALONE


def _by_flags(coordinator: str | None, processes: int | None, process_id: int | None) -> Cluster:
    if coordinator is None or processes is None or process_id is None:
        given = dict(zip(FLAGS, (coordinator, processes, process_id), strict=True))
        there, missing = (", ".join(n for n, v in given.items() if (v is None) == absent) for absent in (False, True))
        raise UserError(f"{there} without {missing}: the three go together")
    match = ADDRESS.fullmatch(coordinator)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(f"--coordinator={coordinator} is no HOST:PORT, such as node0:12345")
    if processes < 1:
        raise UserError(f"--processes={processes}: there is one at least")
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} is not in 0 ... {processes - 1} (--processes={processes})")
    return Cluster("flags", "deactivate", coordinator, processes, process_id) if processes > 1 else ALONE


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    size = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if size < 2:
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        raise UserError(
            f"Open MPI started {size} processes and does not say where the first one is, as version 5 does not; "
            "add --coordinator=HOST:PORT --processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
        )
    here = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Cluster("Open MPI", "ompi", all_devices=_takes_all(environment, here))


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """A batch script itself has the job's variables without a step's, and runs once: it is one process."""
    if any(name not in environment for name in SLURM):
        return None
    size = _number(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    if size < 2:
        return None
    here = _tasks_here(environment)
    return Cluster("SLURM", "slurm", processes=size, all_devices=_takes_all(environment, here))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, by `SLURM_STEP_TASKS_PER_NODE`, such as "2(x3),1"; 0 where it is not known."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environment, "SLURM_NODEID")
    return counts[node] if node < len(counts) else 0


def _takes_all(environment: Mapping[str, str], tasks_here: int) -> bool:
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    return tasks_here == 1 or (visible is not None and "," not in visible)


def _tpu(environment: Mapping[str, str], on_tpu: bool) -> Cluster | None:
    platforms = environment.get("JAX_PLATFORMS", "")
    if not on_tpu or (platforms and "tpu" not in platforms):
        return None
    hosts = next((environment[name] for name in TPU_HOSTS if name in environment), None)
    slices = _number(environment, "MEGASCALE_NUM_SLICES")
    if hosts is not None:
        return Cluster("TPU pod slice", "gketpu") if "," in hosts or slices > 1 else None
    # Only the metadata server of Compute Engine knows whether this machine is one of several; JAX asks it.
    return None if "TPU_SKIP_MDS_QUERY" in environment else Cluster("TPU virtual machine", "gcetpu")


def _number(environment: Mapping[str, str], name: str) -> int:
    """A variable's value; 0 where it is not set."""
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is no number")
    return int(text)
