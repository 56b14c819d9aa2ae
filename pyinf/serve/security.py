"""Who may ask: tokens, addresses, host names and origins."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyinf.errors import ConfigError

__all__ = ["Secret", "check_address", "host_of", "is_loopback", "load_token", "name_allowed"]

_SHORTEST = 16
# What RFC 6750 lets a bearer token be.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>\d{1,5}))?")
_MAKE = "python -c 'import secrets; print(secrets.token_urlsafe(32))' > token.txt"


class Secret:
    """A bearer token, kept as its digest only and compared in constant time."""

    def __init__(self, token: str) -> None:
        if len(token) < _SHORTEST or not _TOKEN.fullmatch(token):
            raise ConfigError(
                f"the token must be at least {_SHORTEST} letters, digits or -._~+/ without spaces; make one: {_MAKE}"
            )
        self._digest = hashlib.sha256(token.encode()).digest()

    def matches(self, given: bytes) -> bool:
        """Whether it is the same token; how long this takes depends on neither."""
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._digest)

    def __repr__(self) -> str:
        return "Secret(…)"


def load_token(file: str | os.PathLike[str] | None, environment: Mapping[str, str] | None = None) -> Secret | None:
    """The token of a file, or else of the environment (``PYINF_SERVE_TOKEN``), or None where neither is given.

    Raises:
        ConfigError: the file cannot be read, or what it holds is no token.
    """
    if file is not None:
        try:
            text = Path(file).read_bytes()[:4096].decode("ascii").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII text"
            raise ConfigError(f"cannot read the token file {file}: {reason}") from error
        return Secret(text)
    environment = os.environ if environment is None else environment
    text = environment.get("PYINF_SERVE_TOKEN", "").strip()
    return Secret(text) if text else None


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only. Of names, only ``localhost`` counts."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, secret: Secret | None) -> None:
    """Refuse to listen where others can reach, without a token.

    Raises:
        ConfigError: names the remedy.
    """
    if secret is None and not is_loopback(host):
        raise ConfigError(
            f"{host or 'every address'!r} can be reached from other machines, so a token is needed: --token-file FILE "
            f"or PYINF_SERVE_TOKEN (make one: {_MAKE}); or listen on 127.0.0.1"
        )


def host_of(header: str) -> str | None:
    """The host in a Host header or an Origin's authority, in lower case and without brackets; None: malformed."""
    found = _HOST.fullmatch(header)
    return found["host"].strip("[]").lower().rstrip(".") if found else None


def name_allowed(host: str, names: Iterable[str]) -> bool:
    """Whether this server answers to ``host``: an IP address, ``localhost``, or one of ``names``.

    A page of another site that makes its own name resolve to this machine (DNS rebinding) comes with that name; with an
    address it cannot come.
    """
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return host == "localhost" or host in {name.lower() for name in names}
