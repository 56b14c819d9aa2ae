"""Listening: a socket, uvicorn, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pyinf.errors import ConfigError, ResourceError

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ConfigError("pyinf serve needs fastapi and uvicorn; install them: pip install 'pyinf[serve]'") from error

from pyinf.serve.limits import Limits
from pyinf.serve.security import Secret, check_address

__all__ = ["address_of", "bind", "make_server", "run"]


class _Protocol(H11Protocol):
    """HTTP/1.1 with a limit on the time that a request's first line and headers may take."""

    head_seconds = 10.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _watch(self) -> None:
        """The time runs from the connection, or from the first byte of a later request, to the end of its headers."""
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self._late is None:
                self._late = self.loop.call_later(self.head_seconds, self.transport.close)
        elif self._late is not None:
            self._late.cancel()
            self._late = None


def bind(host: str, port: int, secret: Secret | None) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: others could reach it and there is no token; or the address is none of this machine's.
        ResourceError: the port is taken.
    """
    check_address(host, secret)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host!r}: it is no address") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        sock.close()
        raise ResourceError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}; choose another --port"
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """Where to find it: ``http://127.0.0.1:8000/``."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app: Any, limits: Limits) -> uvicorn.Server:
    """A uvicorn server for an application of :func:`pyinf.serve.app.create_app`: HTTP/1.1, no WebSocket, no log."""
    protocol = type("Protocol", (_Protocol,), {"head_seconds": limits.head_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, round(limits.grace_seconds)),
        h11_max_incomplete_event_size=1 << 14,
    )
    return uvicorn.Server(config)


def run(app: Any, sock: socket.socket, limits: Limits, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM: then nothing new is taken, and what runs is finished.

    A second Ctrl-C does not wait for it. ``ready`` is called with the address before the first request.
    """
    server = make_server(app, limits)
    with sock, _quiet_end(server):
        if ready is not None:
            ready(address_of(sock))
        server.run(sockets=[sock])


@contextlib.contextmanager
def _quiet_end(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it has stopped: that is no error here."""

    def stop(*_: object) -> None:
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
