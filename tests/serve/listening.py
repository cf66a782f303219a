"""An application that listens at a port of its own, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from sdjax.serve.app import make_app
from sdjax.serve.engine import Engine
from sdjax.serve.security import Access


@contextlib.contextmanager
def listening(engine: Engine, access: Access | None = None) -> Iterator[str]:
    """The address of a server over an engine."""
    server = uvicorn.Server(uvicorn.Config(make_app(engine, access), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(60.0)
