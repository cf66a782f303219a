"""Times a server with many clients, beside the same images in one call, and leaves it as it was found.

    python -m benchmarks.serving [--checkpoint checkpoints/openmoji] [--clients 16] [--each 3] [--steps 25] [--rounds 3]
        [--batch 1,8] [--soak 1000] [--append]

A server is started as a process of its own. In every round --clients times --each images are made in one call of the
pipeline here, in batches of --clients, and by all clients at once, each of which asks for --each one after another; and
as many as there are clients by one client. Of the rounds the medians are shown. --soak sends so many short requests,
every tenth of them cancelled and every tenth malformed, and compares the server's threads, open files and memory before
and after. --append writes a row to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import sdjax
from benchmarks.results import RESULTS, append, facts, show
from sdjax.core.compilation import keep_compiled
from sdjax.core.errors import UserError, run_or_exit
from sdjax.core.flags import parse_flags

ROOT = Path(__file__).parents[1]
PROMPT = "red heart"
INTEGERS = {"clients": 16, "each": 3, "steps": 25, "rounds": 3, "soak": 0, "port": 7899}


class Server(NamedTuple):
    """A server's process and address."""

    process: subprocess.Popen
    address: str

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def state(self) -> dict[str, float]:
        """Threads, open files and MiB of the process."""
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        mebibytes = int(status["VmRSS"].split()[0]) / 1024
        return {"threads": int(status["Threads"]), "files": len(list((folder / "fd").iterdir())), "MiB": mebibytes}


def main() -> None:
    """Reads the command line, measures, prints, and appends where that is asked for."""
    flag = read_command_line(sys.argv)
    keep_compiled()
    pipe = sdjax.load(flag["checkpoint"])
    with serving(flag) as server:
        figures = measure(server, pipe, flag)
        if flag["soak"]:
            figures["soak"] = soak(server, flag["soak"])
    row = {**figures, **facts("serving", ("jax", "jaxlib", "flax"), jax.devices())}
    show(row)
    if flag["append"]:
        append(row, RESULTS)


def read_command_line(argv: list[str]) -> dict[str, Any]:
    """Flags by name; a UserError where one is not what it should be."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", "checkpoints/openmoji", "", flag_values=values)
    flags.DEFINE_string("batch", None, "", flag_values=values)
    flags.DEFINE_bool("append", False, "", flag_values=values)
    for name, default in INTEGERS.items():
        flags.DEFINE_integer(name, default, "", lower_bound=0 if name == "soak" else 1, flag_values=values)
    parse_flags(values, argv, __doc__)
    return {name: values[name].value for name in values}


@contextlib.contextmanager
def serving(flag: dict[str, Any]) -> Iterator[Server]:
    """A server that is ready; it is ended as it would be by a user."""
    command = [sys.executable, "-m", "sdjax.serve", f"--checkpoint={flag['checkpoint']}", f"--port={flag['port']}"]
    command += [f"--queue={max(64, 2 * flag['clients'])}"] + ([f"--batch={flag['batch']}"] if flag["batch"] else [])
    with subprocess.Popen(command, cwd=ROOT) as process:
        server = Server(process, f"http://127.0.0.1:{flag['port']}")
        while not _is_ready(server):
            if process.poll() is not None:
                raise UserError(f"the server ended with {process.returncode}")
            time.sleep(0.2)
        yield server
        process.terminate()
        if process.wait(120) != 0:
            raise UserError(f"the server ended with {process.returncode} when it was asked to")


def _is_ready(server: Server) -> bool:
    try:
        return server.ask("readyz")[0] == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def measure(server: Server, pipe: sdjax.Pipeline, flag: dict[str, Any]) -> dict[str, str]:
    """Images a second of one call, of one client and of all clients, in alternating rounds."""
    clients, each, steps = flag["clients"], flag["each"], flag["steps"]

    def call() -> None:
        pipe([PROMPT], steps=steps, num_images=clients * each, batch_size=clients)

    def one_by_one(client: int = 0, images: int = clients) -> list[float]:
        return [make(server, client * images + number, steps) for number in range(images)]

    def at_once() -> list[float]:
        with ThreadPoolExecutor(clients) as pool:
            return [taken for own in pool.map(lambda client: one_by_one(client, each), range(clients)) for taken in own]

    seconds: dict[Callable, list[float]] = {call: [], one_by_one: [], at_once: []}
    latencies: list[float] = []
    call()  # compiles
    for _ in range(flag["rounds"]):
        for function, taken in seconds.items():
            began = time.perf_counter()
            waited = function()
            taken.append(time.perf_counter() - began)
            latencies += waited if function is at_once else []
    counts = {call: clients * each, one_by_one: clients, at_once: clients * each}
    own, single, many = (counts[function] / np.array(taken) for function, taken in seconds.items())
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99))
    return {
        "what": f"{Path(flag['checkpoint']).name}, {steps} steps, {clients} clients, batches of {flag['batch']}",
        "images/s of all": f"{median(many):.3g}",
        "of one client": f"{median(single):.3g}",
        "of one call": f"{median(own):.3g}",
        "all / one client": f"{median(many / single):.2f}",
        "all / one call": f"{median(many / own):.2f}",
        "latency p50, p95, p99, s": f"{p50:.2f}, {p95:.2f}, {p99:.2f}",
        "soak": "-",
    }


def make(server: Server, seed: int, steps: int) -> float:
    """Seconds of a request for one image, with its bytes."""
    began = time.perf_counter()
    status, job = server.ask("v1/jobs", {"prompt": PROMPT, "options": {"seed": seed, "steps": steps}})
    assert status == 201, job
    with urllib.request.urlopen(f"{server.address}/v1/jobs/{job['id']}/events", timeout=600) as events:
        *_, last = (line for line in events if line.startswith(b"data"))
    (image,) = json.loads(last.removeprefix(b"data: "))["images"]
    with urllib.request.urlopen(server.address + image["url"], timeout=600) as answer:
        answer.read()
    return time.perf_counter() - began


def soak(server: Server, requests: int, workers: int = 16) -> str:
    """Figures of the server's process before and after so many short requests."""

    def one(number: int) -> str:
        if number % 10 == 1:
            status, _ = server.ask("v1/jobs", {"prompt": PROMPT, "options": {"steps": "many"}})
            assert status == 422, status
            return "malformed"
        status, job = server.ask("v1/jobs", {"prompt": PROMPT, "options": {"steps": 2, "seed": number}})
        if status == 503:
            return "refused"
        if number % 10 == 2:
            server.ask(f"v1/jobs/{job['id']}", method="DELETE")
        while True:
            _, job = server.ask(f"v1/jobs/{job['id']}")
            if job["state"] not in ("queued", "running"):
                return job["state"]
            time.sleep(0.05)

    def send(count: int) -> Sequence[str]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, range(count)))

    send(requests // 10)  # what the first requests allocate stays
    before, ends, after = server.state(), send(requests), server.state()
    counts = ", ".join(f"{ends.count(kind)} {kind}" for kind in sorted(set(ends)))
    changes = ", ".join(f"{name} {before[name]:.0f} to {after[name]:.0f}" for name in before)
    return f"{requests} requests ({counts}): {changes}"


if __name__ == "__main__":
    run_or_exit(main)
