"""Runs of sample.py in forked processes, each of which is killed or meets a full disk, until one completes the folder.

    python sample_faults.py kill|full COUNT FOLDER model|noise SAMPLE_FLAGS ...

After each, every file under a final name is whole. Prints what happened as JSON. JAX is imported once, and no process
computes anything before it is forked. `noise` writes noise at once where a model would sample: many more faults a
second.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

import sample
import sdjax
from sdjax.core.errors import run_or_exit

END = b"IEND\xaeB`\x82"
SIDE = 64
IS_NOISE = sys.argv[4:5] == ["noise"]


class Noise:
    """A pipeline whose images are noise of their index."""

    name, inputs, text = "noise", ("prompt",), SimpleNamespace(encoders=())

    def prepare(self, prompts: list[str], negatives: object, **options: Any) -> list[Any]:
        first = options["first_index"]
        return [SimpleNamespace(settings={"prompt": one, "seed": first + i}) for i, one in enumerate(prompts)]

    def run(self, rows: list[Any], batch_size: int, progress: object) -> Iterator[tuple[int, np.ndarray]]:
        for i, row in enumerate(rows):
            yield i, np.random.default_rng(row.settings["seed"]).random((SIDE, SIDE, 3))


def start(flags: list[str], output: int, room: int | None = None) -> int:
    """Fork a process that runs sample.py, with no file larger than `room` bytes; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code: object = 1
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        if IS_NOISE:
            sdjax.load = lambda source, **options: Noise()
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        sys.argv = ["sample.py", *flags]
        run_or_exit(sample.main)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(int(str(code)))


def whole_files(folder: Path) -> list[str]:
    """Names of the files that are not temporary ones, each of which is whole."""
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        if path.suffix == ".png":
            assert path.read_bytes().endswith(END), path
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".partial", path
            continue
        found.append(path.name)
    return sorted(found)


def finish(flags: list[str], room: int | None = None) -> tuple[int, str]:
    """Exit code of a process that is let alone, and what it said, through a pipe: a file could not grow."""
    reading, writing = os.pipe()
    pid = start(flags, writing, room)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def kill(count: int, folder: Path, flags: list[str]) -> dict[str, int]:
    """SIGKILL at random moments of writing; each run is killed after a few new files."""
    cut, rng, nowhere = 0, random.Random(0), os.open(os.devnull, os.O_WRONLY)
    for _ in range(count):
        before, pid = len(whole_files(folder)), start(flags, nowhere)
        wanted = before + rng.randint(1, 12)
        while len(list(folder.glob("[0-9]*"))) < wanted:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before its first files"
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0) == (pid, signal.SIGKILL), "it had finished: more images are needed"
        assert len(whole_files(folder)) > before
        cut += len(list(folder.glob(".*.partial")))
    return {"kills": count, "in the middle of a file": cut}


def full(count: int, folder: Path, flags: list[str]) -> dict[str, int]:
    """A disk that is full at a random byte of a file."""
    refused, rng, room = 0, random.Random(0), 16_000 if IS_NOISE else 2000
    for _ in range(count):
        code, said = finish(flags, rng.randrange(room))
        assert code == 0 or (code == 2 and "make room and run the same command again" in said), said
        refused += code == 2
        whole_files(folder)
        assert not list(folder.glob(".*.partial"))
        for path in rng.sample(sorted(folder.glob("*")), len(list(folder.glob("*"))) // 2):
            path.unlink()
    return {"full disks": refused}


def main() -> None:
    how, count, folder, _, *flags = sys.argv[1:]
    happened = {"kill": kill, "full": full}[how](int(count), Path(folder), flags)
    code, said = finish(flags)
    assert code == 0, said
    names = whole_files(Path(folder))
    print(json.dumps({**happened, "files": len(names), "left": len(list(Path(folder).iterdir())) - len(names)}))


if __name__ == "__main__":
    main()
