"""Tokens, addresses and names."""

from __future__ import annotations

import socket

import pytest

from pyinf.errors import ConfigError, ResourceError
from pyinf.serve.security import Secret, check_address, host_of, is_loopback, load_token, name_allowed
from pyinf.serve.server import address_of, bind

GOOD = "abcdefghijklmnop-0123"


def test_token_from_file_or_environment(tmp_path):
    path = tmp_path / "token"
    path.write_text(GOOD + "\n")
    assert load_token(path, {}).matches(GOOD.encode())
    assert load_token(path, {"PYINF_SERVE_TOKEN": "another-token-0123456"}).matches(GOOD.encode())
    assert load_token(None, {"PYINF_SERVE_TOKEN": f" {GOOD} "}).matches(GOOD.encode())
    assert load_token(None, {}) is None and load_token(None, {"PYINF_SERVE_TOKEN": ""}) is None


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words are no token", "schlüssel-schlüssel".encode(), b"\xff" * 20]
)
def test_what_is_no_token_is_refused(tmp_path, content):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="token"):
        load_token(path, {})


def test_a_missing_token_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the token file"):
        load_token(tmp_path / "none", {"PYINF_SERVE_TOKEN": GOOD})


def test_tokens_are_told_apart_and_not_shown():
    secret = Secret(GOOD)
    assert secret.matches(GOOD.encode())
    for wrong in (b"", GOOD[:-1].encode(), GOOD.encode() + b"x", GOOD.upper().encode(), b"\xff" * 30):
        assert not secret.matches(wrong)
    assert GOOD not in repr(secret) and GOOD not in repr(vars(secret))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    assert is_loopback(host)
    check_address(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "127.0.0.1.example.org", "127.1"])
def test_other_addresses_need_one(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="--token-file"):
        check_address(host, None)
    check_address(host, Secret(GOOD))


def test_nothing_is_bound_without_a_token():
    with pytest.raises(ConfigError, match="--token-file"):
        bind("0.0.0.0", 0, None)


def test_a_taken_port_and_a_strange_address_are_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ResourceError, match="another --port"):
            bind("127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(ConfigError, match="no address"):
        bind("not an address", 0, Secret(GOOD))
    with bind("127.0.0.1", 0, None) as free:
        assert address_of(free) == f"http://127.0.0.1:{free.getsockname()[1]}/"


def test_hosts_of_headers():
    assert host_of("Example.org:80") == "example.org"
    assert host_of("[::1]:8000") == "::1"
    assert host_of("127.0.0.1") == "127.0.0.1"
    for wrong in ("", "a b", "a/b", "user@host", "host:port", "host:1:2", "[::1", "host:123456"):
        assert host_of(wrong) is None


def test_names():
    assert name_allowed("127.0.0.1", ()) and name_allowed("::1", ()) and name_allowed("10.1.2.3", ())
    assert name_allowed("localhost", ())
    assert name_allowed("influence.example.org", ["Influence.example.org"])
    for wrong in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1evil"):
        assert not name_allowed(wrong, ["influence.example.org"])
