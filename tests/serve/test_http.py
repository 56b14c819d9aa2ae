"""The service over real sockets: right answers, right codes, nothing let in and nothing given away."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import COUNT, TOKEN, VOCABULARY, Fake, expected, serving, until

AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}
BODY = 4096  # bytes of a request in these tests


@pytest.fixture(scope="module")
def service():
    with serving(Fake(), TOKEN, ["influence.example.org"], body_bytes=BODY, tokens=32, k=20, queue=256) as running:
        yield running


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service[0], headers=AUTHORISED, timeout=20) as client:
        yield client


def good(response, ids, k):
    assert response.status_code == 200, response.text
    found = [(r["id"], r["score"]) for r in response.json()["results"]]
    assert found == expected(ids, k)
    assert [r["rank"] for r in response.json()["results"]] == list(range(1, k + 1))


def refused(response, status, code):
    assert response.status_code == status, (response.status_code, response.text)
    assert response.json()["error"]["code"] == code
    for word in ("secret", "Traceback", ".py", TOKEN, "site-packages"):
        assert word not in response.text
    assert response.headers["content-type"] == "application/json"
    assert "server" not in response.headers and "access-control-allow-origin" not in response.headers


def raw(address, *pieces, shut=False, pause=0.0):
    """Bytes over a socket of our own, and everything that comes back until the server closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        for piece in pieces:
            try:
                sock.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        if shut:
            sock.shutdown(socket.SHUT_WR)
        parts = []
        while True:
            try:
                part = sock.recv(65536)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_says_all_that_is_known(client):
    response = client.post("/search", json={"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "k": 3})
    good(response, (5, 6, 7), 3)
    answer = response.json()
    first = answer["results"][0]
    # NaN and half a surrogate pair, which JSON cannot hold, are replaced; the rest of the text is as it was.
    assert first["text"].startswith("<img src=x onerror=\"document.title='owned'\"> & </script>")
    assert first["text"].endswith("?") and first["metadata"] == {"source": "s0", "weight": None}
    assert first["first_stage"] == 9.0 and first["position"] is None
    assert answer["exact"] is True and answer["documents_searched"] == COUNT
    assert answer["recall"]["value"] == 0.97 and answer["recall"]["low"] == 0.91
    assert "estimated 97.0% are among them (95% interval 91.0% to 99.0%" in answer["note"]
    assert answer["certificate"] == {"verdict": "good", "reason": "residual 0.01", "bound": None}
    assert answer["query"] == {"tokens": 3, "counted": 2}
    assert answer["timing"]["batch"] == 1


def test_text_and_prompt_with_completion(client):
    good(client.post("/search", json={"text": "abc"}), [ord(c) % VOCABULARY for c in "abc"], 10)
    response = client.post("/search", json={"prompt": "ab", "completion": "cd", "k": 2, "documents": False})
    good(response, [ord(c) % VOCABULARY for c in "abcd"], 2)
    assert response.json()["query"] == {"tokens": 4, "counted": 2}
    assert response.json()["results"][0]["text"] is None and response.json()["results"][0]["metadata"] == {}


def test_long_documents_are_cut():
    with serving(Fake(), document_characters=4) as (address, _, _):
        results = httpx.post(f"{address}/search", json={"text": "abc", "k": 2}).json()["results"]
    assert results[1]["text"] == "Docu" and results[1]["cut"] is True


def test_info_and_health(client, service):
    info = client.get("/info")
    assert info.status_code == 200
    assert {k: info.json()[k] for k in ("documents", "max_tokens", "max_k", "max_body_bytes", "vocabulary")} == {
        "documents": COUNT, "max_tokens": 32, "max_k": 20, "max_body_bytes": BODY, "vocabulary": VOCABULARY,
    }  # fmt: skip
    assert info.json()["searcher"] == {"method": "fake", "damping": 0.1}
    assert httpx.get(f"{service[0]}/health").json() == {"status": "ok"}


# ------------------------------------------------------------------------------------------ refusals

BAD = {
    "malformed": (b'{"text": "abc"', 400, "malformed_json"),
    "no JSON": (b"\xff\xfe\x00", 400, "malformed_json"),
    "deep": (b"[" * 4000, 400, "malformed_json"),
    "a number of 4000 digits": (b'{"text": "abc", "k": ' + b"9" * 4000 + b"}", 422, "invalid"),
    "empty": (b"", 422, "invalid"),
    "a list": (b"[1, 2]", 422, "invalid"),
    "nothing": (b"{}", 422, "invalid"),
    "text as number": (b'{"text": 5}', 422, "invalid"),
    "k as text": (b'{"text": "abc", "k": "5"}', 422, "invalid"),
    "k as truth": (b'{"text": "abc", "k": true}', 422, "invalid"),
    "k of a half": (b'{"text": "abc", "k": 2.5}', 422, "invalid"),
    "k zero": (b'{"text": "abc", "k": 0}', 422, "invalid"),
    "k infinite": (b'{"text": "abc", "k": Infinity}', 422, "invalid"),
    "k too large": (b'{"text": "abc", "k": 21}', 422, "k_too_large"),
    "unknown field": (b'{"text": "abc", "rescore": 1}', 422, "invalid"),
    "two forms": (b'{"text": "abc", "input_ids": [1, 2]}', 422, "invalid"),
    "prompt alone": (b'{"prompt": "abc"}', 422, "invalid"),
    "empty completion": (b'{"prompt": "abc", "completion": ""}', 422, "invalid"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', 422, "invalid"),
    "ids as text": (b'{"input_ids": ["1", "2"]}', 422, "invalid"),
    "ids as fractions": (b'{"input_ids": [1.5, 2]}', 422, "invalid"),
    "one id": (b'{"input_ids": [1]}', 422, "invalid"),
    "negative id": (b'{"input_ids": [1, -1]}', 422, "invalid"),
    "huge id": (b'{"input_ids": [1, 99999999999999999999]}', 422, "invalid"),
    "labels of another length": (b'{"input_ids": [1, 2], "labels": [1]}', 422, "invalid"),
    "odd label": (b'{"input_ids": [1, 2], "labels": [1, -5]}', 422, "invalid"),
    "labels without ids": (b'{"text": "abc", "labels": [1]}', 422, "invalid"),
    "outside the vocabulary": (b'{"input_ids": [1, 100]}', 422, "outside_vocabulary"),
    "label outside": (b'{"input_ids": [1, 2], "labels": [1, 100]}', 422, "outside_vocabulary"),
    "nothing counts": (b'{"input_ids": [1, 2], "labels": [1, -100]}', 422, "nothing_counts"),
    "too many tokens": (json.dumps({"input_ids": [1] * 33}).encode(), 422, "too_many_tokens"),
    "too long a text": (json.dumps({"text": "a" * 33}).encode(), 422, "too_many_tokens"),
    "no tokens": (b'{"text": "no-token"}', 422, "unanswerable"),
    "a query that breaks the search": (b'{"input_ids": [13, 1]}', 500, "internal"),
    "a score that is not finite": (b'{"input_ids": [14, 1]}', 500, "internal"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(client, name):
    body, status, code = BAD[name]
    refused(client.post("/search", content=body, headers=JSON), status, code)


def test_a_refusal_names_the_field_and_does_not_repeat_what_was_sent(client):
    response = client.post("/search", json={"input_ids": [1, "my-password"], "k": 0})
    refused(response, 422, "invalid")
    assert "my-password" not in response.text
    assert [f["field"] for f in response.json()["error"]["fields"]] == ["input_ids.1", "k"]


def test_an_incident_is_in_the_log_and_not_in_the_answer(client, caplog):
    response = client.post("/search", json={"input_ids": [13, 1]})
    incident = response.json()["error"]["incident"]
    until(lambda: incident in caplog.text)
    assert "exploded" in caplog.text and "exploded" not in response.text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_only_json(client, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    refused(client.post("/search", content=b'{"text": "abc"}', headers=headers), 415, "not_json")


def test_unknown_paths_and_methods(client):
    for path in ("/nothing", "/search/", "/docs/", "/../etc/passwd", "/static/%2e%2e/x", "/%00", "/redoc"):
        refused(client.get(path), 404, "unknown_path")
    for method, path in (("GET", "/search"), ("DELETE", "/search"), ("POST", "/info"), ("OPTIONS", "/search")):
        response = client.request(method, path)
        refused(response, 405, "unknown_method")
        assert response.headers["allow"]


def chunks(size, each=1024):
    for _ in range(size // each):
        yield b" " * each


@pytest.mark.parametrize("size", [BODY + 1024, 3 << 20])
def test_oversized_bodies(client, size):
    refused(client.post("/search", content=b" " * size, headers=JSON), 413, "body_too_long")
    refused(client.post("/search", content=chunks(size), headers=JSON), 413, "body_too_long")
    refused(client.request("GET", "/info", content=b" " * size), 413, "body_too_long")


def test_a_body_of_the_largest_size_is_read(client):
    body = b'{"text": "abc"}'
    good(client.post("/search", content=body.ljust(BODY), headers=JSON), [97, 98, 99], 10)
    good(client.post("/search", content=iter([body, b" " * (BODY - len(body))]), headers=JSON), [97, 98, 99], 10)


def test_an_oversized_body_is_not_waited_for(service):
    head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"
    answer = raw(service[0], head.encode())
    assert answer.startswith(b"HTTP/1.1 413") and b"100 Continue" not in answer


@pytest.mark.parametrize(
    "lengths", ["Content-Length: -5", "Content-Length: 5\r\nContent-Length: 6", "Content-Length: x"]
)
def test_crooked_lengths(service, lengths):
    head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n{lengths}\r\n\r\n"
    assert raw(service[0], head.encode(), b"{}").startswith(b"HTTP/1.1 400")


# ------------------------------------------------------------------------------------------ who asks

WRONG = {
    "none": ({}, "token_needed"),
    "another scheme": ({"Authorization": f"Basic {TOKEN}"}, "token_needed"),
    "no scheme": ({"Authorization": TOKEN}, "token_needed"),
    "empty": ({"Authorization": "Bearer"}, "token_needed"),
    "wrong": ({"Authorization": "Bearer another-token-9876543210"}, "wrong_token"),
    "a part": ({"Authorization": f"Bearer {TOKEN[:-1]}"}, "wrong_token"),
    "longer": ({"Authorization": f"Bearer {TOKEN}x"}, "wrong_token"),
}


@pytest.mark.parametrize("name", WRONG)
def test_nobody_gets_in_without_the_token(service, name):
    headers, code = WRONG[name]
    searched = len(service[1].engine.searcher.batches)
    with httpx.Client(base_url=service[0], headers=headers) as client:
        for method, path in (("POST", "/search"), ("GET", "/info"), ("GET", "/nothing"), ("POST", "/"), ("PUT", "/x")):
            response = client.request(method, path, content=b'{"text": "abc"}' if method == "POST" else None)
            refused(response, 401, code)
            assert response.headers["www-authenticate"].startswith("Bearer")
        refused(client.post("/search", content=chunks(1 << 20)), 401, code)
    assert len(service[1].engine.searcher.batches) == searched


def test_two_tokens_are_none(service):
    pair = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer something-else-000000")]
    refused(httpx.get(f"{service[0]}/info", headers=pair), 401, "token_needed")


def test_the_token_in_the_address_does_not_count(service):
    refused(httpx.get(f"{service[0]}/info?token={TOKEN}&access_token={TOKEN}"), 401, "token_needed")


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health"])
def test_what_is_public_needs_no_token_and_has_no_data(service, path):
    response = httpx.get(f"{service[0]}{path}")
    assert response.status_code == 200
    assert "Document 1" not in response.text and TOKEN not in response.text
    assert response.headers["cache-control"] == "no-store" and response.headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_other_names_are_not_answered(client, host):
    for path in ("/", "/info", "/health"):
        refused(client.get(path, headers={"Host": host}), 421, "unknown_host")


@pytest.mark.parametrize("host", ["", "a b", "user@127.0.0.1", "127.0.0.1/x"])
def test_malformed_hosts(client, host):
    refused(client.get("/info", headers={"Host": host}), 400, "bad_host")


@pytest.mark.parametrize("host", ["localhost:1234", "[::1]:80", "influence.example.org", "INFLUENCE.example.org:443"])
def test_own_names_are(client, host):
    assert client.get("/info", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_get_nothing(client, service):
    own = service[0]
    for origin in ("http://evil.example", "null", own.replace("http", "ftp"), f"{own}0", "http://localhost:3000"):
        refused(client.post("/search", json={"text": "abc"}, headers={"Origin": origin}), 403, "cross_site")
    for site in ("cross-site", "same-site"):
        refused(client.get("/info", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}), 403, "cross_site")
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
    good(client.post("/search", json={"text": "abc"}, headers={"Origin": own}), [97, 98, 99], 10)


# ------------------------------------------------------------------------------------------ many at once


def test_sixty_four_clients_with_everything_mixed_in(service):
    """Each client makes all kinds of requests, in an order of its own; every one gets the code that is its due."""
    address, app, _ = service
    before = app.engine.state()
    served = []

    def kinds(n):
        ids = [n % 90 + 1, 2, 3, n % 7]
        ids = [i + (i in (13, 14)) * 3 for i in ids]
        yield lambda c: good(
            c.post("/search", json={"input_ids": ids, "k": n % 5 + 1}, headers=AUTHORISED), ids, n % 5 + 1
        )
        text = f"client {n}"
        tokens = [ord(c) % VOCABULARY for c in text]
        yield lambda c: good(c.post("/search", json={"text": text, "k": 4}, headers=AUTHORISED), tokens, 4)
        names = sorted(BAD)
        for name in (names[n % len(names)], names[(n * 7 + 3) % len(names)]):
            body, status, code = BAD[name]
            yield lambda c, b=body, s=status, e=code: refused(
                c.post("/search", content=b, headers={**AUTHORISED, **JSON}), s, e
            )
        long = {**AUTHORISED, **JSON}
        yield lambda c: refused(c.post("/search", content=b" " * (BODY + 1), headers=long), 413, "body_too_long")
        yield lambda c: refused(c.post("/search", content=chunks(BODY * 4), headers=long), 413, "body_too_long")
        yield lambda c: refused(c.post("/search", json={"text": "abc"}), 401, "token_needed")
        wrong = {"Authorization": f"Bearer wrong-token-{n:020d}"}
        yield lambda c: refused(c.post("/search", json={"text": "abc"}, headers=wrong), 401, "wrong_token")
        yield lambda c: refused(c.get("/admin", headers=AUTHORISED), 404, "unknown_path")
        yield lambda c: refused(c.delete("/search", headers=AUTHORISED), 405, "unknown_method")
        yield lambda c: refused(c.get("/info", headers={**AUTHORISED, "Host": "evil.example"}), 421, "unknown_host")
        yield lambda c: good(c.post("/search", json={"input_ids": ids, "k": 2}, headers=AUTHORISED), ids, 2)

    gate = threading.Barrier(64)

    def client(n):
        asks = list(kinds(n))
        asks = asks[n % len(asks) :] + asks[: n % len(asks)]
        with httpx.Client(base_url=address, timeout=60) as own:
            gate.wait(30)
            for ask in asks:
                ask(own)
                served.append(n)

    with ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(client, n) for n in range(64)]:
            done.result(120)
    assert len(served) == 64 * 12
    after = app.engine.state()
    # Three good ones each, and nothing else was searched but what the list of bad ones breaks on purpose.
    assert after["served"] - before["served"] == 64 * 3
    breaking = sum(
        status == 500
        for n in range(64)
        for status in (BAD[sorted(BAD)[n % len(BAD)]][1], BAD[sorted(BAD)[(n * 7 + 3) % len(BAD)]][1])
    )
    assert after["failed"] - before["failed"] == breaking
    assert after["waiting"] == after["running"] == 0
    assert app.active == 0
    assert any(len(batch) > 1 for batch in app.engine.searcher.batches)  # they did share searches
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_full_queue_is_503():
    searcher = Fake()
    searcher.hold = threading.Event()
    with serving(searcher, queue=2, batch=1) as (address, app, _), ThreadPoolExecutor(8) as pool:
        ask = lambda n: httpx.post(f"{address}/search", json={"input_ids": [n, 1], "k": 2}, timeout=30)  # noqa: E731
        first = pool.submit(ask, 1)
        assert searcher.entered.wait(10)
        more = [pool.submit(ask, n) for n in range(2, 8)]
        until(lambda: sum(f.done() for f in more) == 4)
        assert app.engine.state()["waiting"] == 2
        searcher.hold.set()
        good(first.result(20), (1, 1), 2)
        codes = sorted(f.result(20).status_code for f in more)
        assert codes == [200, 200, 503, 503, 503, 503]
        for n, future in enumerate(more, 2):
            response = future.result()
            if response.status_code == 200:
                good(response, (n, 1), 2)
            else:
                refused(response, 503, "busy")
                assert 1 <= int(response.headers["retry-after"]) <= 60
        good(ask(9), (9, 1), 2)  # and it goes on


def test_too_many_requests_at_a_time_are_503():
    searcher = Fake()
    searcher.hold = threading.Event()
    with serving(searcher, concurrency=2) as (address, app, _), ThreadPoolExecutor(4) as pool:
        ask = lambda: httpx.post(f"{address}/search", json={"input_ids": [1, 1], "k": 2}, timeout=30)  # noqa: E731
        running = [pool.submit(ask) for _ in range(2)]
        until(lambda: app.active == 2)
        refused(ask(), 503, "busy")
        assert ask().headers["retry-after"]
        assert httpx.get(f"{address}/health").status_code == 200
        searcher.hold.set()
        for future in running:
            good(future.result(20), (1, 1), 2)


def test_an_answer_that_does_not_come_is_504():
    searcher = Fake()
    searcher.hold = threading.Event()
    with serving(searcher, seconds=0.3) as (address, app, _):
        refused(httpx.post(f"{address}/search", json={"text": "abc"}), 504, "too_slow")
        refused(httpx.post(f"{address}/search", json={"text": "abd"}), 504, "too_slow")
        searcher.hold.set()
        until(lambda: app.engine.state()["running"] == 0)
        good(httpx.post(f"{address}/search", json={"text": "abe"}), [97, 98, 1], 10)
    assert len(searcher.batches) == 2  # what nobody waits for any more is not searched


def test_who_leaves_is_not_searched_for():
    searcher = Fake()
    searcher.hold = threading.Event()
    with serving(searcher) as (address, app, _), ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: httpx.post(f"{address}/search", json={"text": "abc"}, timeout=20))
        assert searcher.entered.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/search", json={"text": "abd"}, timeout=0.3)
        until(lambda: app.active == 1)
        searcher.hold.set()
        assert first.result(20).status_code == 200
        good(httpx.post(f"{address}/search", json={"text": "abe"}), [97, 98, 1], 10)
    assert [q.input_ids[-1] for batch in searcher.batches for q in batch] == [99, 1]


def test_slow_bodies_and_slow_heads_are_given_up():
    with serving(Fake(), body_seconds=0.3, head_seconds=0.3) as (address, app, _):
        head = (
            b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        )
        assert raw(address, head, b'{"text"').startswith(b"HTTP/1.1 408")
        started = time.monotonic()
        assert raw(address, b"GET /info HTTP/1.1\r\n") == b""
        # A second request over the same connection has the same limit.
        get = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        assert raw(address, get, b"GET /info HT", pause=0.1).count(b"HTTP/1.1") == 1
        assert time.monotonic() - started < 5
        # A connection that keeps to it lives on.
        with httpx.Client(base_url=address) as client:
            assert client.get("/health").status_code == 200
            time.sleep(0.5)
            assert client.get("/health").status_code == 200
        assert app.active == 0


def test_garbage_does_no_harm(service):
    address = service[0]
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"A" * 100_000,
    ):
        answer = raw(address, garbage, shut=True)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    many = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n"
    assert raw(address, many).startswith((b"HTTP/1.1 4", b""))
    upgrade = b"GET /search HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert raw(address, upgrade, shut=True).startswith(b"HTTP/1.1 401")
    assert httpx.get(f"{address}/health").status_code == 200


# ------------------------------------------------------------------------------------------ the end


def test_stopping_finishes_what_runs():
    searcher = Fake()
    searcher.hold = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        with serving(searcher, batch=1) as (address, app, server):
            ask = lambda n: httpx.post(f"{address}/search", json={"input_ids": [n, 1], "k": 2}, timeout=30)  # noqa: E731
            running = [pool.submit(ask, n) for n in (1, 2, 3)]
            until(lambda: app.engine.state()["waiting"] == 2)
            server.should_exit = True
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{address}/health")
            searcher.hold.set()
            for n, future in zip((1, 2, 3), running, strict=True):
                good(future.result(20), (n, 1), 2)
        assert not app.engine.healthy


def test_stopping_does_not_wait_for_ever(caplog):
    searcher = Fake()
    searcher.hold = threading.Event()
    with ThreadPoolExecutor(4) as pool, serving(searcher, batch=1, grace_seconds=1) as (address, app, server):
        ask = lambda n: httpx.post(f"{address}/search", json={"input_ids": [n, 1], "k": 2}, timeout=30)  # noqa: E731
        running = [pool.submit(ask, n) for n in (1, 2)]
        until(lambda: app.engine.state()["waiting"] == 1)
        server.should_exit = True
        for future in running:
            refused(future.result(20), 503, "stopping")


def test_health_says_that_it_is_stopping(service):
    with serving(Fake()) as (address, app, _):
        app.engine.close()
        response = httpx.get(f"{address}/health")
        assert response.status_code == 503 and response.json() == {"status": "stopping"}
        refused(httpx.post(f"{address}/search", json={"text": "abc"}), 503, "stopping")


def test_without_a_tokenizer_only_ids_are_taken():
    with serving(Fake(reads_text=False)) as (address, _, _):
        refused(httpx.post(f"{address}/search", json={"text": "abc"}), 422, "no_tokenizer")
        good(httpx.post(f"{address}/search", json={"input_ids": [1, 2]}), (1, 2), 10)
        assert httpx.get(f"{address}/info").json()["reads_text"] is False
