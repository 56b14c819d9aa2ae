"""The queue, the batches, the end."""

from __future__ import annotations

import threading

import pytest
from serving import Fake, expected, until

from pyinf.errors import ConfigError, NonFiniteError
from pyinf.serve import Busy, Engine, Limits, Query, Stopped


def found(future):
    done = future.result(10)
    return [(hit.id, hit.score) for hit in done.answer.hits], done


def held(**options):
    """An engine whose worker sits in a search of one query."""
    searcher = Fake()
    searcher.hold = threading.Event()
    engine = Engine(searcher, **options).start()
    first = engine.submit(Query((1, 2)), 3)
    assert searcher.entered.wait(10)
    return searcher, engine, first


def test_what_waits_together_is_searched_together():
    searcher, engine, first = held(batch=4)
    others = [engine.submit(Query((1, i)), 3 if i < 7 else 5) for i in range(2, 10)]
    searcher.hold.set()
    assert found(first)[0] == expected((1, 2), 3)
    for i, future in enumerate(others, 2):
        answer, done = found(future)
        assert answer == expected((1, i), 3 if i < 7 else 5)
        assert done.batch == {2: 4, 3: 4, 4: 4, 5: 4, 6: 1}.get(i, 3)
        assert done.waited > 0
    # Four of the same k, then the fifth of them; the three that want another k wait their turn, together.
    assert [len(batch) for batch in searcher.batches] == [1, 4, 1, 3]
    assert engine.state() == {"waiting": 0, "running": 0, "served": 9, "failed": 0, "searches": 4}
    assert engine.close()


def test_a_full_queue_says_when_to_come_back():
    searcher, engine, first = held(queue=2)
    waiting = [engine.submit(Query((5, 5)), 3) for _ in range(2)]
    with pytest.raises(Busy) as error:
        engine.submit(Query((5, 6)), 3)
    assert 1 <= error.value.retry_after <= 60
    waiting[0].cancel()  # who gives up makes room
    more = engine.submit(Query((5, 7)), 3)
    searcher.hold.set()
    assert found(more)[0] == expected((5, 7), 3)
    assert found(first)[0] == expected((1, 2), 3)
    assert engine.close()
    assert sum(map(len, searcher.batches)) == 3  # the cancelled one was never searched


def test_a_bad_query_spoils_no_other():
    searcher, engine, first = held()
    bad, good, worse = (engine.submit(Query(ids), 3) for ids in ((13, 1), (2, 1), (14, 1)))
    searcher.hold.set()
    assert found(good)[0] == expected((2, 1), 3)
    with pytest.raises(RuntimeError, match="exploded"):
        bad.result(10)
    with pytest.raises(NonFiniteError):
        worse.result(10)
    assert first.result(10)
    assert engine.healthy and engine.state()["failed"] == 2
    assert engine.close()


def test_closing_finishes_what_waits_and_takes_nothing_more():
    searcher, engine, first = held()
    second = engine.submit(Query((3, 3)), 2)
    closed = []
    closer = threading.Thread(target=lambda: closed.append(engine.close(10)))
    closer.start()
    until(lambda: not engine.healthy)
    with pytest.raises(Stopped):
        engine.submit(Query((3, 4)), 2)
    searcher.hold.set()
    closer.join(10)
    assert closed == [True]
    assert found(second)[0] == expected((3, 3), 2) and first.done()


def test_closing_does_not_wait_for_ever():
    searcher, engine, first = held()
    second = engine.submit(Query((3, 3)), 2)
    assert engine.close(0.05) is False
    with pytest.raises(Stopped):
        second.result(1)
    searcher.hold.set()
    assert found(first)[0] == expected((1, 2), 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dying_worker_leaves_nobody_waiting():
    class Dying(Fake):
        def search(self, queries, k):
            self.entered.set()
            assert self.hold.wait(10)
            raise SystemExit

    searcher = Dying()
    searcher.hold = threading.Event()
    engine = Engine(searcher).start()
    first = engine.submit(Query((1, 2)), 3)
    assert searcher.entered.wait(10)
    second = engine.submit(Query((1, 2)), 3)
    searcher.hold.set()
    for future in (first, second):
        with pytest.raises(Stopped):
            future.result(10)
    assert not engine.healthy
    with pytest.raises(Stopped):
        engine.submit(Query((1, 2)), 3)


def test_counted_labels():
    assert Query((4, 5, 6)).counted == 2
    assert Query((4, 5, 6), (4, -100, 6)).counted == 1
    assert Query((4, 5, 6), (4, -100, -100)).counted == 0


def test_limits_are_positive():
    with pytest.raises(ConfigError, match="queue is 0"):
        Limits(queue=0)
