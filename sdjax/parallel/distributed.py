"""Several processes as one run: how they find each other, and how they end together.

How a cluster tells a process who it is, is JAX's own knowledge (google/jax, jax/_src/clusters); `choose` only decides
whether there is a cluster at all, and which.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.core.errors import UserError, run_or_exit

FLAGS = ("--coordinator", "--processes", "--process_id")
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
FAILED = "sdjax/failed"
LISTEN_EVERY = 1.0  # seconds
AGREED_BYTES = 4096

logger = logging.getLogger("sdjax")


class Cluster(NamedTuple):
    """How this process finds the others.

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
        coordinator: the flag, HOST:PORT.
        processes: the flag.
        process_id: the flag.
        on_tpu: this machine has TPU chips.

    Raises:
        UserError: a flag without the others, an address that is none, a number out of range, a variable that is none.
    """
    given = (coordinator, processes, process_id)
    if any(value is not None for value in given):
        return _by_flags(*given)
    return _open_mpi(environment) or _slurm(environment) or _tpu(environment, on_tpu) or ALONE


def _by_flags(coordinator: str | None, processes: int | None, process_id: int | None) -> Cluster:
    given = dict(zip(FLAGS, (coordinator, processes, process_id), strict=True))
    missing = [name for name, value in given.items() if value is None]
    if coordinator is None or processes is None or process_id is None:
        there = ", ".join(name for name in FLAGS if name not in missing)
        raise UserError(f"{there} without {', '.join(missing)}: the three go together")
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


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    coordinator_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins this process with the others of its run, if there are any; to be called before any computation.

    Args:
        coordinator: where process 0 listens, HOST:PORT; None to ask the environment, as for the next two.
        processes: how many there are.
        process_id: which one this is.
        coordinator_timeout: seconds after which the others are no longer waited for.
        heartbeat_timeout: seconds of silence after which a process is taken for dead, and the run ends.

    Raises:
        UserError: as `choose`, or the others could not be joined. Where they do not come in time the process itself
            ends, with a line on stderr and exit code 2: JAX would end it with a core dump.
    """
    cluster = choose(os.environ, coordinator, processes, process_id, _on_tpu())
    if cluster.method is None:
        logger.info("processes: %s", cluster.name)
        return
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _deadline(coordinator_timeout, cluster):
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process_id,
                local_device_ids=[] if cluster.all_devices else None,
                cluster_detection_method=cluster.method,
                # The deadline speaks first.
                initialization_timeout=coordinator_timeout + 60,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"cannot join the processes ({cluster.name}): {' '.join(str(error).split())}") from error
    logger.info("processes: %d by %s, this is process %d", jax.process_count(), cluster.name, jax.process_index())
    threading.Thread(target=_listen, daemon=True).start()


def sync(name: str) -> None:
    """Waits until all processes are here; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(text: str) -> str:
    """What the first process says, in all of them.

    Args:
        text: of the first process; at most 4,096 bytes. That of the others counts for nothing.
    """
    if jax.process_count() == 1:
        return text
    said = np.frombuffer(text.encode().ljust(AGREED_BYTES, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(said)).rstrip(b"\0").decode()


def is_mine(number: int) -> bool:
    """Whether this process is to do the work of that number: all take turns."""
    return number % jax.process_count() == jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def run_together(main: Callable[[], None]) -> None:
    """`run_or_exit` for a script of several processes: where one stops with an error, the others soon do."""
    try:
        run_or_exit(main)
    except SystemExit as error:
        _leave(int(error.code or 0) if not isinstance(error.code, str) else 1)
        raise
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
        _leave(1)
        raise


def _leave(code: int) -> None:
    """Ends a process that failed, at once: JAX's farewell would wait for the others, and they for this one."""
    if code == 0 or not jax.distributed.is_initialized():
        return
    _client().key_value_set(FAILED, f"process {jax.process_index()}", allow_overwrite=True)
    if is_first():  # the others hear of it from a server in this process
        threading.Event().wait(3 * LISTEN_EVERY)
    _end(code)


def _listen() -> None:
    """Ends this process when another one has failed; the main thread may be waiting for that one for ever."""
    client = _client()
    while True:
        threading.Event().wait(LISTEN_EVERY)
        try:
            who = client.key_value_try_get(FAILED)
        except Exception as error:  # jaxlib has one error for "no such key" and for "shut down"
            if "NOT_FOUND" in str(error):
                continue
            return
        if who != f"process {jax.process_index()}":
            print(f"error: {who} of this run failed; what it wrote says why", file=sys.stderr)
            _end(2)
        return


@contextmanager
def _deadline(seconds: int, cluster: Cluster) -> Iterator[None]:
    def expire() -> None:
        place = f" at {cluster.coordinator}" if cluster.coordinator else ""
        wait = f"within {seconds} s"
        if cluster.process_id and cluster.coordinator and not _answers(cluster.coordinator):
            print(f"error: no coordinator answers{place} {wait} (--coordinator_timeout)", file=sys.stderr)
        else:
            print(f"error: not all processes came together{place} {wait} (--coordinator_timeout)", file=sys.stderr)
        _end(2)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
    from jax._src import distributed  # the store that all processes share has no public name

    return distributed.global_state.client


def _on_tpu() -> bool:
    from jax._src import cloud_tpu_init  # what JAX's detection asks itself

    return cloud_tpu_init.running_in_cloud_tpu_vm
