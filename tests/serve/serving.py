"""A searcher that needs no model, and the service on a free port of the loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future

from pyinf.errors import DataError
from pyinf.serve import Answer, Hit, Limits, Query
from pyinf.serve.app import create_app
from pyinf.serve.security import Secret
from pyinf.serve.server import address_of, bind, make_server

TOKEN = "a-token-for-tests-0123456789"
VOCABULARY, COUNT = 100, 50
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> & </script><b>bold</b> \u202eright to left\u202c\ud800"


class Fake:
    """Document i scores as the sum of the ids minus i; so every query has an answer of its own that tests can tell."""

    count, vocabulary, positions = COUNT, VOCABULARY, 64

    def __init__(self, reads_text=True, seconds=0.0):
        self.reads_text, self.seconds = reads_text, seconds
        self.batches: list[list[Query]] = []
        self.hold: threading.Event | None = None
        self.entered = threading.Event()

    def encode(self, record):
        text = record.get("text")
        prompt = record.get("prompt", "")
        whole = text if text is not None else prompt + record["response"]
        if "no-token" in whole:
            raise DataError("/secret/place/train.jsonl, line 3: no tokens")
        ids = tuple(ord(c) % VOCABULARY for c in whole)
        return Query(
            ids, None if text is not None else tuple(-100 if i < len(prompt) else v for i, v in enumerate(ids))
        )

    def search(self, queries, k):
        self.batches.append(list(queries))
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(30)
        time.sleep(self.seconds)
        if any(q.input_ids[0] == 13 for q in queries):
            raise RuntimeError("/secret/place/model.safetensors exploded")
        if any(q.input_ids[0] == 14 for q in queries):
            return [Answer([Hit(0, float("nan"), 0.0)]) for _ in queries]
        return [self.answer(q, k, len(queries)) for q in queries]

    @staticmethod
    def answer(query, k, together=1):
        total = sum(query.input_ids)
        hits = [Hit(i, float(total - i), float(total - i) / 2, document(i)) for i in range(k)]
        recall = {"k": k, "cut": 20, "value": 0.97, "low": 0.91, "high": 0.99, "level": 0.95, "sample": 256}
        certificate = {"verdict": "good", "reason": "residual 0.01", "bound": float("inf")}
        return Answer(hits, True, {**recall, "queries": together}, None, certificate)

    def describe(self):
        return {"method": "fake", "damping": 0.1}


def document(i):
    return {"text": HOSTILE if i == 0 else f"Document {i}.", "source": f"s{i}", "weight": float("nan")}


def expected(ids, k):
    """Ids and scores of the right answer."""
    return [(i, float(sum(ids) - i)) for i in range(k)]


@contextlib.contextmanager
def serving(searcher, secret=None, names=(), **limits):
    """The service in a thread: yields its address, the guard and the server."""
    bounds = Limits(**limits)
    secret = Secret(secret) if isinstance(secret, str) else secret
    app = create_app(searcher, bounds, secret, names, title="a store <of> tests")
    sock = bind("127.0.0.1", 0, secret)
    address = address_of(sock).rstrip("/")
    server = make_server(app, bounds)
    ended: Future = Future()

    def work():
        try:
            ended.set_result(server.run(sockets=[sock]))
        except BaseException as error:
            ended.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    limit = time.monotonic() + 20
    while not server.started and not ended.done() and time.monotonic() < limit:
        time.sleep(0.01)
    assert server.started, ended
    try:
        yield address, app, server
    finally:
        if searcher.__class__ is Fake and searcher.hold is not None:
            searcher.hold.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"
        ended.result()


def until(condition, seconds=10.0):
    """Wait for a condition; a failure if it does not come."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.005)
