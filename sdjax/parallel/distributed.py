"""Several processes as one run: how they find each other, and how they end together.

Whether there are several, and who says so, is decided in `clusters`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.core.errors import UserError, run_or_exit
from sdjax.parallel.clusters import Cluster, choose

FAILED = "sdjax/failed"
LISTEN_EVERY = 1.0  # seconds
AGREED_BYTES = 4096

logger = logging.getLogger("sdjax")


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    coordinator_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins this process with the others of its run, if there are any; to be called before any computation.

    Args:
        coordinator, processes, process_id: where process 0 listens, HOST:PORT, how many there are, and which one this
            is; None to ask the environment.
        coordinator_timeout: seconds after which the others are no longer waited for.
        heartbeat_timeout: seconds of silence after which a process is taken for dead, and the run ends.

    Raises:
        UserError: as `choose`, or the others could not be joined. Where they do not come in time the process itself
            ends, with a line on stderr and exit code 2: JAX would end it with a core dump.
    """
    cluster = choose(os.environ, coordinator, processes, process_id, _on_tpu())
    if cluster.method is None:
        logger.debug("processes: %s", cluster.name)  # nothing was chosen
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
    threading.Thread(target=_listen, args=(f"process {jax.process_index()}",), daemon=True).start()


def end_by_signals() -> None:
    """Before `initialise`: SIGTERM ends this process at once. Else JAX catches it, for a run that saves its state."""
    jax.config.update("jax_enable_preemption_service", False)


def sync(name: str) -> None:
    """Waits until all processes are here; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(text: str) -> str:
    """The text of the first process, at most 4,096 bytes, in all of them; the others' own counts for nothing."""
    if jax.process_count() == 1:
        return text
    said = np.frombuffer(text.encode().ljust(AGREED_BYTES, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(said)).rstrip(b"\0").decode()


def check_agreed(what: str, mine: str) -> None:
    """Raises a UserError in each process for which something is not what it is for the first one."""
    said = agreed(mine)
    if mine != said:
        raise UserError(f"{what} of process {jax.process_index()}: {mine}; of process 0: {said}; they must be the same")


def is_mine(number: int) -> bool:
    """True if this process is to do the work of that number: all take turns."""
    return number % jax.process_count() == jax.process_index()


def is_first() -> bool:
    """True for the process that writes what is written once."""
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


def _listen(me: str) -> None:
    """Ends this process, `me`, when another one has failed; the main thread may be waiting for that one for ever."""
    client = _client()
    while True:
        threading.Event().wait(LISTEN_EVERY)
        try:
            who = client.key_value_try_get(FAILED)
        except Exception as error:  # jaxlib has one error for "no such key" and for "shut down"
            if "NOT_FOUND" in str(error):
                continue
            return
        if who != me:
            print(f"error: {who} of this run failed; what it wrote says why", file=sys.stderr)
            _end(2)
        return


@contextmanager
def _deadline(seconds: int, cluster: Cluster) -> Iterator[None]:
    def expire() -> None:
        place = f" at {cluster.coordinator}" if cluster.coordinator else ""
        is_unanswered = cluster.process_id and cluster.coordinator and not _answers(cluster.coordinator)
        what = "no coordinator answers" if is_unanswered else "not all processes came together"
        print(f"error: {what}{place} within {seconds} s (--coordinator_timeout)", file=sys.stderr)
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
