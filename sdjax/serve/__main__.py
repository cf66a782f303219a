"""Serve models to browsers and to the clients that people use already.

    python -m sdjax.serve --config configs/openmoji.py          a page at http://127.0.0.1:7860
    python -m sdjax.serve --checkpoint SOURCE [--checkpoint SOURCE ...] --batch 1,2,4,8 --sizes 1024x1024,832x1216

Models
    --config FILE.py         whose sample.checkpoint is served
    --checkpoint SOURCE      a Hub id, folder or file, as of sample.py; of several the first is the current one
    --memory GIB             of weights at a time: models are loaded on demand, and the least recently used leaves
    --mesh data=4            devices; all of them by default
{load}
Batches
    --batch 1,4              sizes that requests share; 1 on CPUs, else 1,4. A request gives the same picture in each,
                             to the bit where the size is the same (on CPUs but for the last place of a batch)
    --sizes WxH,...          that are compiled before the server is ready; the model's own by default, none for none
    --rows_per_call N        network calls between two chances to join, cancel and show previews (1)
    --queue N                requests that may wait (64); further ones are answered 503

Requests
    --max_steps N (150)  --max_side PIXELS (2048)  --max_images N (16)  --max_upload MIB (32)

Access
    --host ADDRESS           127.0.0.1 by default; any other needs --auth
    --port N                 7860
    --auth FILE              that holds USER:PASSWORD (Basic) or a token (Bearer), which only its owner may read
    --hostname NAME          by which it is addressed behind a proxy; repeated for several
    --cors ORIGIN            of another page that may ask; repeated for several
    --outdir DIR             keeps every image with its settings; without it none is kept
"""

from __future__ import annotations

import logging
import os
import re
import signal
import stat
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import jax
from absl import flags
from ml_collections import config_flags

import sdjax
from sdjax.core.compilation import keep_compiled
from sdjax.core.errors import UserError, run_or_exit
from sdjax.core.flags import parse_flags
from sdjax.core.untrusted import read_text
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.pipeline.options import LOAD_OPTIONS, help_of, parse_number
from sdjax.pipeline.pipeline import Pipeline
from sdjax.serve.engine import Engine
from sdjax.serve.limits import Limits
from sdjax.serve.models import GIB, Models
from sdjax.serve.security import LOOPBACK, Access
from sdjax.serve.worker import EngineOptions

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
DEFAULTS = {
    "host": "127.0.0.1",
    "port": "7860",
    "queue": "64",
    "rows_per_call": "1",
    "max_steps": "150",
    "max_side": "2048",
    "max_images": "16",
    "max_upload": "32",
}
TEXTS = ("batch", "sizes", "memory", "mesh", "auth", "outdir")
MANY = ("checkpoint", "hostname", "cors")
ROOT = Path(sdjax.__file__).parents[1]

logger = logging.getLogger("sdjax")


def main() -> None:
    """Read the command line, load, compile, and serve until a signal ends it."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sdjax").setLevel(logging.INFO)
    flag = read_command_line(sys.argv)
    access = read_access(flag)
    sizes = read_sizes(flag["sizes"])
    outdir = None if flag["outdir"] is None else Path(flag["outdir"])
    if outdir is not None:
        outdir.mkdir(parents=True, exist_ok=True)
    options = EngineOptions(
        batch_sizes=read_batch(flag["batch"]),
        queue_length=_number(flag, "queue"),
        rows_per_call=_number(flag, "rows_per_call"),
        outdir=outdir,
    )
    megabytes = _number(flag, "max_upload")
    limits = Limits(
        *(_number(flag, name) for name in ("max_steps", "max_side", "max_images")), max_upload_bytes=megabytes << 20
    )
    keep_compiled()
    engine = Engine(read_models(flag), options, limits)
    serve(engine, access, flag["host"], _number(flag, "port", 0), engine.start(sizes))


def serve(engine: Engine, access: Access, host: str, port: int, ready: Future[None]) -> None:
    """Answer requests until SIGTERM or SIGINT; what runs is finished, what comes is refused.

    Raises:
        UserError: a model cannot be loaded, or the address cannot be had.
    """
    import uvicorn

    from sdjax.serve.app import make_app

    config = uvicorn.Config(make_app(engine, access), host=host, port=port, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)

    def is_ready(future: Future[None]) -> None:
        if future.exception() is not None:
            server.should_exit = True
        else:
            logger.info("ready: http://%s:%d", f"[{host}]" if ":" in host else host, port)

    ready.add_done_callback(is_ready)
    drain = threading.Thread(target=_drain, args=(server, engine), daemon=True)
    drain.start()
    try:
        server.run()
    except (SystemExit, KeyboardInterrupt) as error:  # uvicorn's answer to an address that is taken, and to a signal
        if not server.started:
            raise UserError(f"--host {host} --port {port}: the address cannot be had") from error
    if ready.done() and ready.exception() is not None:
        raise cast(Exception, ready.exception())
    engine.stop()


def _drain(server: Any, engine: Engine) -> None:
    """Refuse new requests as soon as the server is asked to end, while it waits for those that run."""
    while not server.should_exit:
        threading.Event().wait(0.1)
    engine.is_draining = True


def read_command_line(argv: list[str]) -> dict[str, Any]:
    """Flags by name; a UserError where one is unknown."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    for name in (*DEFAULTS, *TEXTS, *MANY, *LOAD_OPTIONS):
        many = name in MANY or (name in LOAD_OPTIONS and LOAD_OPTIONS[name].many)
        define = flags.DEFINE_multi_string if many else flags.DEFINE_string
        define(name, cast(Any, DEFAULTS.get(name)), "", flag_values=values)
    parse_flags(values, argv, str(__doc__).format(load=help_of(LOAD_OPTIONS)))
    return {name: values[name].value for name in values}


def read_models(flag: dict[str, Any]) -> Models:
    """The checkpoints by name; a UserError where there is none."""
    sources: list[str] = list(flag["checkpoint"] or ())
    options = {name: flag[name] for name in LOAD_OPTIONS if flag[name]}
    if not sources and flag["config"] is not None:
        settings = dict(flag["config"].sample)
        sources = [settings["checkpoint"]] if settings.get("checkpoint") else []
        options = {name: settings[name] for name in LOAD_OPTIONS if settings.get(name)} | options
    if not sources:
        raise UserError("give --config FILE.py with a sample.checkpoint, or --checkpoint SOURCE")
    mesh = make_mesh(parse_mesh(flag["mesh"] or "data=-1")) if jax.device_count() > 1 else None
    memory = None if flag["memory"] is None else int(parse_number("--memory", flag["memory"], float) * GIB)

    def load(source: str) -> Pipeline:
        return sdjax.load(source, mesh=mesh, **options)

    return Models({name: beside(source) for name, source in zip(names_of(sources), sources, strict=True)}, load, memory)


def beside(source: str) -> str:
    """The source; that of a config may be given relative to the scripts."""
    there = ROOT / source
    return str(there) if there.exists() and not Path(source).exists() else source


def names_of(sources: list[str]) -> list[str]:
    """Names by which clients call checkpoints, none twice."""
    names: list[str] = []
    for source in sources:
        stem = Path(source.split("@")[0].rstrip("/")).name
        name = stem.removesuffix(".safetensors").removesuffix(".ckpt")
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def read_batch(text: str | None) -> tuple[int, ...]:
    """Batch sizes, ascending."""
    if text is None:
        return (1,) if jax.default_backend() == "cpu" and jax.device_count() == 1 else (1, 4)
    sizes = [int(parse_number("--batch", part, int)) for part in text.split(",")]
    if min(sizes) < 1:
        raise UserError(f"--batch {text!r}: choose sizes of at least 1")
    return tuple(sorted(set(sizes)))


def read_sizes(text: str | None) -> list[tuple[int, int]] | None:
    """Heights and widths to compile for; None for the model's own."""
    if text is None or text == "none":
        return None if text is None else []
    found = [SIZE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        raise UserError(f"--sizes {text!r}: choose WIDTHxHEIGHT, several with commas, or none")
    return [(int(match[2]), int(match[1])) for match in found if match]


def read_access(flag: dict[str, Any]) -> Access:
    """The conditions of requests; a UserError where anybody could ask, from other machines."""
    secret = "" if flag["auth"] is None else read_secret(Path(flag["auth"]))
    if flag["host"] not in LOOPBACK and not secret:
        raise UserError(f"--host {flag['host']}: other machines could ask; give --auth FILE, too")
    named = tuple(flag["hostname"] or ())
    hosts = (*LOOPBACK, *named) if flag["host"] in LOOPBACK or named else ()
    return Access(secret, hosts, tuple(flag["cors"] or ()), 2 * _number(flag, "max_upload") << 20)


def read_secret(path: Path) -> str:
    """USER:PASSWORD or a token; a UserError where the file cannot be read, is empty, or may be read by others."""
    secret = read_text(path, 4096).strip()
    if not secret:
        raise UserError(f"--auth {path}: the file is empty; write USER:PASSWORD or a token")
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"--auth {path}: other users may read it; chmod 600 {path}")
    return secret


def _number(flag: dict[str, Any], name: str, least: int = 1) -> int:
    number = int(parse_number(f"--{name}", flag[name], int))
    if number < least:
        raise UserError(f"--{name} {number}: choose at least {least}")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before there is anything to finish
    run_or_exit(main)
