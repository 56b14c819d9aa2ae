"""What stands before the application: names, origins, tokens, sizes, times and numbers of requests.

Every refusal is a small JSON object and says nothing about the machine. The order is: who is asked (Host), who asks
(Origin, token), how many do, how much they send. Nothing of a body is read before the first three are settled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from pyinf.serve.limits import Limits
from pyinf.serve.security import Secret, host_of, name_allowed

__all__ = ["PUBLIC", "Guard", "error_body", "internal_error", "new_incident"]

log = logging.getLogger("pyinf.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Pages without data and the sign of life: the same for everybody, so nobody has to say who he is.
PUBLIC = frozenset({"/", "/docs", "/openapi.json", "/health"})
_HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}
# After a refusal the rest of the body is read and thrown away, this long and this much at most: a connection that is
# closed while the client still writes would take the refusal with it.
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 1 << 23


_INTERNAL = "something went wrong here; the server's log has it under this incident"


def new_incident() -> str:
    """A number by which a client's report finds its place in the server's log."""
    return secrets.token_hex(4)


def internal_error(incident: str) -> dict[str, Any]:
    """Body of a 500: nothing about what happened but where to look."""
    return error_body("internal", _INTERNAL, incident=incident)


def error_body(code: str, message: str, **more: Any) -> dict[str, Any]:
    """The one form of all errors."""
    return {"error": {"code": code, "message": message, **more}}


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class _Gone(Exception):
    """The client has left."""


class Guard:
    """ASGI middleware; see the module.

    Args:
        secret: who knows it may ask; None: everybody who can reach the port.
        names: host names that the service answers to, besides addresses and ``localhost``.
    """

    def __init__(self, app: Any, limits: Limits, secret: Secret | None = None, names: Iterable[str] = ()) -> None:
        self.app, self.limits, self.secret, self.names = app, limits, secret, frozenset(names)
        self.active = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        sender = _Sender(send)
        headers = _headers(scope)
        counted = False
        try:
            self._check_names(headers)
            self._check_token(scope, headers)
            if scope["path"] != "/health":
                if self.active >= self.limits.concurrency:
                    raise _Refusal(503, "busy", "too many requests at a time; try again shortly", {"retry-after": "1"})
                self.active += 1
                counted = True
            body = await self._read(headers, receive)
            await self._run(scope, body, receive, sender)
        except _Gone:
            pass
        except _Refusal as refusal:
            if not sender.started:
                await self._refuse(refusal, headers, receive, sender)
        except Exception:
            # Where an answer has begun the application has dealt with it: Starlette raises it once more afterwards.
            if not sender.started:
                incident = new_incident()
                log.exception("incident %s", incident)
                await sender.json(500, internal_error(incident), {"connection": "close"})
        except asyncio.CancelledError:
            # uvicorn cancels what still runs when its time to stop is over.
            if not sender.started:
                await sender.json(503, error_body("stopping", "the service is stopping"), {"connection": "close"})
        finally:
            self.active -= counted

    # -- who -----------------------------------------------------------------------------------------------------------

    def _check_names(self, headers: dict[bytes, list[bytes]]) -> None:
        hosts = headers.get(b"host", [])
        host = host_of(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if host is None:
            raise _Refusal(400, "bad_host", "the Host header is missing or malformed")
        if not name_allowed(host, self.names):
            raise _Refusal(
                421, "unknown_host", "this service does not answer to that name; start it with --allow-host NAME"
            )
        if headers.get(b"sec-fetch-site", [b"none"])[0] in (b"cross-site", b"same-site") and b"origin" not in headers:
            # A link from elsewhere to the search page is fine, but nothing else is.
            if headers.get(b"sec-fetch-mode", [b""])[0] != b"navigate":
                raise _Refusal(403, "cross_site", "requests of other sites' pages are not answered")
        for origin in headers.get(b"origin", []):
            scheme, _, authority = origin.decode("latin-1").partition("://")
            if scheme not in ("http", "https") or authority.lower() != hosts[0].decode("latin-1").lower():
                raise _Refusal(403, "cross_site", "requests of other sites' pages are not answered")

    def _check_token(self, scope: Message, headers: dict[bytes, list[bytes]]) -> None:
        if self.secret is None or (scope["path"] in PUBLIC and scope["method"] in ("GET", "HEAD")):
            return
        given = headers.get(b"authorization", [])
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not token:
            raise _Refusal(
                401, "token_needed", "send the header Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
            )
        if not self.secret.matches(token.strip()):
            raise _Refusal(
                401, "wrong_token", "the token is not valid", {"www-authenticate": 'Bearer error="invalid_token"'}
            )

    # -- how much ------------------------------------------------------------------------------------------------------

    async def _read(self, headers: dict[bytes, list[bytes]], receive: Receive) -> bytes:
        """The whole body, if it is not too long and comes in time."""
        too_long = _Refusal(413, "body_too_long", f"a request has at most {self.limits.body_bytes} bytes")
        if _length(headers) > self.limits.body_bytes:
            raise too_long
        if not _has_body(headers):
            return b""
        parts: list[bytes] = []
        size = 0

        async def read() -> None:
            nonlocal size
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.limits.body_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise _Refusal(408, "body_too_slow", "the body did not arrive in time") from None
        return b"".join(parts)

    # -- the application -----------------------------------------------------------------------------------------------

    async def _run(self, scope: Message, body: bytes, receive: Receive, sender: _Sender) -> None:
        """The application with a body that is there; it is cancelled when the client leaves."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # the watcher below sees to disconnections
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        running = asyncio.ensure_future(self.app(scope, replay, sender))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
            if running.done() or sender.started:
                await running
            else:
                raise _Gone
        finally:
            for task in (running, watching):
                task.cancel()
            await asyncio.gather(running, watching, return_exceptions=True)

    async def _refuse(
        self, refusal: _Refusal, headers: dict[bytes, list[bytes]], receive: Receive, sender: _Sender
    ) -> None:
        body = error_body(refusal.code, str(refusal))
        if not _has_body(headers):
            await sender.json(refusal.status, body, refusal.headers)
            return
        # The answer goes out at once and whole, but the connection is closed only after a while.
        await sender.json(refusal.status, body, {**refusal.headers, "connection": "close"}, more=True)
        if b"100-continue" not in headers.get(b"expect", []):
            try:
                await asyncio.wait_for(_drain(receive), _LINGER_SECONDS)
            except asyncio.TimeoutError:
                pass
        await sender({"type": "http.response.body", "body": b"", "more_body": False})


class _Sender:
    """Sends with the headers that every answer has."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            own = list(message.get("headers", []))
            present = {name.lower() for name, _ in own}
            message = {**message, "headers": own + [pair for pair in _HEADERS.items() if pair[0] not in present]}
        await self._send(message)

    async def json(self, status: int, body: Any, headers: dict[str, str], more: bool = False) -> None:
        """A whole answer; with ``more`` its last message is left to the caller."""
        content = json.dumps(body, ensure_ascii=False).encode()
        pairs = {"content-type": "application/json", "content-length": str(len(content)), **headers}
        start = [(name.encode(), value.encode()) for name, value in pairs.items()]
        await self({"type": "http.response.start", "status": status, "headers": start})
        await self({"type": "http.response.body", "body": content, "more_body": more})


async def _drain(receive: Receive) -> None:
    """Read a body to its end and forget it."""
    size = 0
    while size < _LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        size += len(message.get("body", b""))


def _headers(scope: Message) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(bytes(name).lower(), []).append(bytes(value).strip())
    return found


def _length(headers: dict[bytes, list[bytes]]) -> int:
    value = headers.get(b"content-length", [b"0"])[0]
    return int(value) if value.isdigit() and len(value) < 20 else 1 << 62


def _has_body(headers: dict[bytes, list[bytes]]) -> bool:
    return b"transfer-encoding" in headers or _length(headers) > 0
