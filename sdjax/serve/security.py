"""Access: secrets, names, origins and sizes of requests, as plain ASGI around the application."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/healthz", "/readyz")
# Nothing from elsewhere; pictures may also come from memory.
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": POLICY}
# FastAPI's page of the schema draws it with a script from elsewhere.
SCHEMA_PAGES = ("/docs", "/redoc")


class Access(NamedTuple):
    """Conditions of a request.

    Attributes:
        secret: USER:PASSWORD for Basic authentication, else a bearer token; "" asks for none.
        hosts: names by which the server may be addressed; () for any. A page from elsewhere whose name was made to
            mean this machine is thereby refused.
        origins: pages of other servers that may ask.
        max_bytes: of a request's body.
    """

    secret: str = ""
    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()
    max_bytes: int = 2**26


class Guard:
    """The application behind the checks."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or pass on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            return await _refuse(send, *refusal)
        counted = _Counted(receive, self.access.max_bytes)
        answers: list[bool] = []

        async def sending(message: MutableMapping[str, Any]) -> None:
            if counted.left >= 0:
                await send(message)
            elif not answers:  # what the application makes of a body that breaks off is no answer
                answers.append(True)
                await _refuse(send, 413, self._too_large())

        await self.app(scope, counted, _with_headers(sending, scope["path"]))
        return None

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason; None for a request that may pass."""
        access = self.access
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if access.hosts and host not in access.hosts:
            return 421, f"this server is not {host!r}"
        origin = headers.get("origin", "")
        if origin and origin not in access.origins and urlsplit(origin).netloc != headers.get("host"):
            return 403, f"pages of {origin} may not ask"
        if access.secret and path not in OPEN and not is_known(headers.get("authorization", ""), access.secret):
            return 401, "authentication is needed"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > access.max_bytes:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self.access.max_bytes} bytes"


def is_known(header: str, secret: str) -> bool:
    """True if an Authorization header has the secret, in a time that tells nothing of it."""
    kind, _, value = header.partition(" ")
    wanted = base64.b64encode(secret.encode()).decode() if kind.lower() == "basic" else secret
    return kind.lower() in ("basic", "bearer") and hmac.compare_digest(value.strip().encode(), wanted.encode())


class _Counted:
    """The body of a request whose length was not said, up to a bound."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.left = receive, most

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        return message if self.left >= 0 else {"type": "http.disconnect"}


def _with_headers(send: Send, path: str) -> Send:
    own = {n: v for n, v in HEADERS.items() if not (path in SCHEMA_PAGES and n == "Content-Security-Policy")}
    extra = [(name.lower().encode(), value.encode()) for name, value in own.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *extra]
        await send(message)

    return sending


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="sdjax", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
